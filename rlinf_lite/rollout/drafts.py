"""Speculative decoding without a second model: tokens that a row may draw next, guessed from the texts of its group.

A drafted token is computed together with the one before it, and kept only if it is the token that the row then draws.
So drafts change no bit of a response, right or wrong: with counter-based sampling a draw is a function of the row's
text, its key and the step. They pay where few rows are left: a forward pass over some tokens more takes little longer.

Guesses follow what came after the last tokens elsewhere in the prompt and the group's responses, as prompt lookup does
(Saxena, "Prompt Lookup Decoding", 2023).
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from rlinf_lite.models import products
from rlinf_lite.rollout.output import Sampled
from rlinf_lite.types import GenerationBatch

MAX_ROWS = 32
"""Most sequences for which drafts are made. With more of them, each additional token takes its full share of time."""
_FIXED = 6
"""Time of a forward pass that does not depend on the number of tokens, as a number of tokens. A cautious value: with
135M parameters in fp32 it is about 10."""
_MOST = 8
"""Most drafts per sequence."""
_NEW = 0.05
"""Weight of the newest guess in a rate of right guesses."""
_CONTEXTS = (4, 3, 2, 1)
"""Numbers of last tokens with which a guess is looked up, in this order."""
_LONGEST = max(_CONTEXTS)
_MOST_NOTES = 1 << 20
"""Entries in the table of what came after what. It is emptied when it has more, about 80 MB."""


class Drafts:
    """Makes the drafts of a batch's rows, more where the same kind of guess was right before."""

    def __init__(self, batch: GenerationBatch, sampled: Sampled, eos_ids: Container[int], longest: int) -> None:
        """
        Args:
            sampled: what the rows have drawn, which is filled in meanwhile.
            eos_ids: never drafted: nothing comes after them.
            longest: no draft makes a prompt and its response longer.
        """
        self._batch, self._sampled, self._eos, self._longest = batch, sampled, eos_ids, longest
        self._next: dict[tuple[int, ...], int] = {}
        """What came after some tokens of a group the last time: by the group and the tokens."""
        self._groups: set[int] = set()
        """Whose prompts and finished responses are in it."""
        self._tails: dict[int, tuple[int, ...]] = {}
        """The last tokens of each row."""
        self._rates = dict.fromkeys(_CONTEXTS, 0.0)
        """The share of guesses that were right, by the number of tokens that they were looked up with; the last ones
        weigh most."""
        self._guesses: dict[int, list[int]] = {}
        """The last ones for each row, also those that were not computed."""
        self._sizes: dict[int, list[int]] = {}
        """With how many tokens each of them was looked up."""

    def choose(self, rows: Sequence[int | None], lengths: Sequence[int]) -> list[list[int]]:
        """The tokens to compute behind the last one of each sequence.

        Args:
            rows: the row of the batch that each sequence belongs to; None if several have it: it gets no drafts.
            lengths: tokens that it has drawn so far.
        """
        guesses = [[] if row is None else self._guess(row, length) for row, length in zip(rows, lengths, strict=True)]
        number = self._number(rows)
        return [guess[:count] for guess, count in zip(guesses, number, strict=True)]

    def _number(self, rows: Sequence[int | None]) -> list[int]:
        """How many of each sequence's guesses to compute: as many as make the most tokens in the shortest time."""
        chances: list[tuple[float, int]] = []
        for index, row in enumerate(rows):
            chance = 1.0
            for size in () if row is None else self._sizes[row]:
                chance *= self._rates[size]
                chances.append((-chance, index))
        chances.sort()  # a row's own stay in their order
        tokens, best, count = float(len(rows)), 0.0, 0
        for taken in range(len(chances) + 1):
            speed = tokens / (products.padded(len(rows) + taken) + _FIXED)
            if speed >= best:
                best, count = speed, taken
            tokens -= chances[taken][0] if taken < len(chances) else 0.0
        number = [0] * len(rows)
        for _, index in chances[:count]:
            number[index] += 1
        return number

    def _guess(self, row: int, length: int) -> list[int]:
        """What may come next; it is kept, to be compared with what is drawn."""
        group = row // self._batch.group_size
        number = min(
            _MOST, self._batch.sampling.max_new_tokens - 1 - length, self._longest - len(self._prompt(group)) - length
        )
        if row not in self._tails:
            self._meet(row, group, length)
        tail, guess, sizes = self._tails[row], list[int](), list[int]()
        while len(guess) < number:
            size = next((n for n in _CONTEXTS if n <= len(tail) and (group, *tail[-n:]) in self._next), None)
            if size is None or (found := self._next[group, *tail[-size:]]) in self._eos:
                break
            guess.append(found)
            sizes.append(size)
            tail = (*tail, found)[-_LONGEST:]
        self._guesses[row], self._sizes[row] = guess, sizes
        return guess

    def _meet(self, row: int, group: int, length: int) -> None:
        prompt = self._prompt(group)
        if group not in self._groups:
            if len(self._next) > _MOST_NOTES:  # most are of groups that are finished; other rows are met again
                for notes in (self._next, self._groups, self._tails):
                    notes.clear()
            self._groups.add(group)
            self._learn(group, prompt[:1], prompt[1:])
            size = self._batch.group_size
            for other in range(group * size, (group + 1) * size):
                self._learn(group, prompt, self._tokens(other, int(self._sampled.length_N[other])))
        self._tails[row] = self._learn(group, prompt, self._tokens(row, length))

    def _prompt(self, group: int) -> Sequence[int]:
        return self._batch.prompts[group].problem.prompt_ids

    def _tokens(self, row: int, length: int) -> list[int]:
        tokens: list[int] = self._sampled.tokens_NT[row, :length].tolist()
        return tokens

    def _learn(self, group: int, text: Sequence[int], more: Sequence[int]) -> tuple[int, ...]:
        """Note what comes after what, where ``more`` follows ``text``; return the last tokens."""
        tail = tuple(text[-_LONGEST:])
        for token in more:
            for size in _CONTEXTS:
                if size <= len(tail):
                    self._next[group, *tail[-size:]] = token
            tail = (*tail, token)[-_LONGEST:]
        return tail

    def took(self, row: int, tokens: Sequence[int]) -> None:
        """Learn what a row has drawn since its last guesses."""
        if row not in self._tails:
            return
        guess, group = self._guesses[row], row // self._batch.group_size
        for guessed, size, token in zip(guess, self._sizes[row], tokens, strict=False):
            self._rates[size] += _NEW * ((guessed == token) - self._rates[size])
            if guessed != token:
                break
        self._tails[row] = self._learn(group, self._tails[row], tokens)
