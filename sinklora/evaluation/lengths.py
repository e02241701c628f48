"""How much filler a prompt takes to reach a length in tokens, and no more."""

from __future__ import annotations

from collections.abc import Callable

# Pieces of the first guess; and after so many guesses by slope the rest is halved.
FIRST_GUESS = 16
MOST_GUESSES = 12


def most_pieces(
    count_tokens: Callable[[int], int], room: int, *, supply: int | None = None, guess: int = FIRST_GUESS
) -> int | None:
    """The most pieces of filler, up to `supply`, whose prompt has at most `room` tokens; None where none at
    all has.

    Guesses by the tokens of the pieces so far, since each count tokenises a whole prompt.

    Args:
        count_tokens: tokens of the prompt with so many pieces. Grows with them, but for an odd token where
            pieces meet; what is returned fits in any case, and one more piece does not.
        guess: tried first, at least 1; a prompt like this one is near what this one takes.
    """
    fits, tokens = 0, count_tokens(0)
    if tokens > room:
        return None
    begun, guesses = tokens, 0
    too_many = None if supply is None else supply + 1
    guess = guess if supply is None else min(guess, supply)
    while too_many is None or too_many - fits > 1:
        found = count_tokens(guess)
        guesses += 1
        if found <= room:
            fits, tokens = guess, found
        else:
            too_many = guess
        # Tokens of a piece; the first guesses may be far off, so they grow by 16 at most.
        slope = max((found - begun) / guess, 1e-9)
        step = max(1, min(int((room - tokens) / slope), 15 * fits + FIRST_GUESS))
        guess = fits + step
        if too_many is not None:
            guess = min(guess, too_many - 1) if guesses < MOST_GUESSES else (fits + too_many) // 2
    return fits
