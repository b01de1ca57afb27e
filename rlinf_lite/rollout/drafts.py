"""Speculative decoding without a second model: tokens that a row may draw next, guessed from the texts of its group.

A drafted token is computed together with the one before it, and kept only if it is the token that the row then draws.
So drafts change no bit of a response, right or wrong: with counter-based sampling a draw is a function of the row's
text, its key and the step. They pay where few rows are left, which cost nearly as much as some more would.

Guesses follow what came after the last tokens elsewhere in the prompt and the group's responses, as prompt lookup does
(Saxena, "Prompt Lookup Decoding", 2023).
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from rlinf_lite.models import products
from rlinf_lite.rollout.output import Sampled
from rlinf_lite.types import GenerationBatch

MAX_ROWS = 16
"""Sequences for which drafts are made: with more, a token costs what it does by itself."""
_MOST = 8
"""Tokens that a sequence is given at most."""
_CONTEXTS = (3, 2, 1)
"""Numbers of last tokens after which a guess is looked up; the first that is found counts."""


class Drafts:
    """Makes the drafts of a batch's rows, more for those whose guesses were right."""

    def __init__(self, batch: GenerationBatch, sampled: Sampled, eos_ids: Container[int]) -> None:
        """
        Args:
            sampled: what the rows have drawn, which is filled in meanwhile.
            eos_ids: never drafted: nothing comes after them.
        """
        self._batch, self._sampled, self._eos = batch, sampled, eos_ids
        self._next: dict[tuple[int, ...], int] = {}
        """What came after some tokens of a group the last time: by the group and the tokens."""
        self._groups: set[int] = set()
        """Whose prompts and finished responses are in it."""
        self._tails: dict[int, tuple[int, ...]] = {}
        """The last tokens of each row."""
        self._depths: dict[int, int] = {}
        """How many drafts a row is worth, from how far its last guesses came true; 0: only those that cost nothing."""
        self._guesses: dict[int, list[int]] = {}

    def choose(self, rows: Sequence[int | None], lengths: Sequence[int]) -> list[list[int]]:
        """The tokens to compute behind the last one of each sequence.

        Args:
            rows: the row of the batch that each sequence belongs to; None if several have it: it gets no drafts.
            lengths: tokens that it has drawn so far.
        """
        most = self._batch.sampling.max_new_tokens
        guesses = [
            [] if row is None else self._guess(row, length, min(_MOST, most - 1 - length))
            for row, length in zip(rows, lengths, strict=True)
        ]
        number = [
            0 if row is None else min(len(guess), self._depths[row]) for row, guess in zip(rows, guesses, strict=True)
        ]
        total = len(rows) + sum(number)
        free = products.padded(total) - total  # are computed in any case
        for index, guess in enumerate(guesses):
            more = min(free, len(guess) - number[index])
            number[index], free = number[index] + more, free - more
        return [guess[:count] for guess, count in zip(guesses, number, strict=True)]

    def _guess(self, row: int, length: int, number: int) -> list[int]:
        """Up to ``number`` tokens; they are kept, to be compared with what is drawn."""
        group = row // self._batch.group_size
        if row not in self._tails:
            self._meet(row, group, length)
        tail, guess = self._tails[row], list[int]()
        while len(guess) < number:
            found = next((self._next[key] for size in _CONTEXTS if (key := (group, *tail[-size:])) in self._next), None)
            if found is None or found in self._eos:
                break
            guess.append(found)
            tail = (*tail[1:], found)
        self._guesses[row] = guess
        return guess

    def _meet(self, row: int, group: int, length: int) -> None:
        prompt = self._batch.prompts[group].problem.prompt_ids
        if group not in self._groups:
            self._groups.add(group)
            size = self._batch.group_size
            for other in range(group * size, (group + 1) * size):
                self._learn(group, prompt, self._tokens(other, int(self._sampled.length_N[other])))
        self._tails[row] = self._learn(group, prompt, self._tokens(row, length))
        self._depths[row] = 0

    def _tokens(self, row: int, length: int) -> list[int]:
        tokens: list[int] = self._sampled.tokens_NT[row, :length].tolist()
        return tokens

    def _learn(self, group: int, text: Sequence[int], more: Sequence[int]) -> tuple[int, ...]:
        """Note what comes after what in ``more``, which follows ``text``, and in that; return the last tokens."""
        most = max(_CONTEXTS)
        text = [*text, *more]
        for index in range(1, len(text)):
            for size in _CONTEXTS:
                if size <= index:
                    self._next[group, *text[index - size : index]] = text[index]
        return tuple(text[-most:])

    def took(self, row: int, tokens: Sequence[int]) -> None:
        """Learn what a row has drawn since its last guesses."""
        if row not in self._tails:
            return
        guess, group = self._guesses[row], row // self._batch.group_size
        right = next((i for i, pair in enumerate(zip(guess, tokens, strict=False)) if pair[0] != pair[1]), None)
        if right is not None:
            self._depths[row] = right // 2
        elif guess:
            self._depths[row] = min(_MOST, max(1, 2 * self._depths[row]))
        for token in tokens:
            tail = self._tails[row]
            for size in _CONTEXTS:
                if size <= len(tail):
                    self._next[group, *tail[-size:]] = token
            self._tails[row] = (*tail, token)[-max(_CONTEXTS) :]
