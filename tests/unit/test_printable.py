"""Text from files, as a terminal and a UTF-8 file may get it."""

from rlinf_lite.printable import escape_controls, replace_surrogates


def test_control_characters_are_escaped_and_letters_stay():
    assert escape_controls("a\nb\x1b[31m ä 数\u202e") == "a\\nb\\x1b[31m ä 数\\u202e"


def test_half_a_surrogate_pair_is_replaced():
    assert replace_surrogates("a\ud800b ä") == "a?b ä"
