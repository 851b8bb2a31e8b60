"""Steps of a rollout, found on token ids inside the graph (DESIGN section 2, "Step")."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from heal_jax.model.tokenizer import NewlineTable


class Steps(NamedTuple):
    """of_token [B, T] int32: the step that each token belongs to (-1 beyond the rollout, and where there is no step);
    starts [B, T] bool: first tokens of steps; number [B] int32: K.
    """

    of_token: Array
    starts: Array
    number: Array


def find_steps(
    table: NewlineTable | tuple[ArrayLike, ...], tokens: ArrayLike, length: ArrayLike, text_length: ArrayLike
) -> Steps:
    """Split rollouts into steps.

    table: the tokenizer's, or (inside a compiled function) its columns as `columns` gives them; tokens [B, T] int32;
    length [B]: tokens of the rollout; text_length [B]: tokens without the EOS. A token that holds the last newline of a
    run of two or more ends its step; a blank step joins the one before it, at the start the first; the EOS joins the
    last. A rollout of white space alone has no step.
    """
    return _find(*(columns(table) if isinstance(table, NewlineTable) else table), tokens, length, text_length)


def columns(table: NewlineTable) -> tuple[np.ndarray, ...]:
    """The table's arrays, [V] each."""
    return table.lead, table.trail, table.only, table.inner, table.blank


@partial(jax.jit)
def _find(
    lead: Array, trail: Array, only: Array, inner: Array, blank: Array, tokens: Array, length: Array, text_length: Array
) -> Steps:
    at = jnp.arange(tokens.shape[1])[None, :]
    real = at < text_length[:, None]
    lead, trail = lead[tokens].astype(jnp.int32), trail[tokens].astype(jnp.int32)
    only, inner, blank = only[tokens], inner[tokens], blank[tokens] | ~real

    # Newlines at the end of the text up to and with each token (capped at 2).
    def join(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        goes_on = right[0]
        return left[0] & goes_on, jnp.where(goes_on, jnp.minimum(left[1] + right[1], 2), right[1])

    _, run = jax.lax.associative_scan(join, (only, trail), axis=1)
    before = jnp.pad(run, ((0, 0), (1, 0)))[:, :-1]

    # Whether the text after each token begins with a newline: that of the next token that has text.
    says = ~(only & (lead == 0)) & real

    def later(right: tuple[Array, Array], left: tuple[Array, Array]) -> tuple[Array, Array]:
        return left[0] | right[0], jnp.where(left[0], left[1], right[1])

    _, first = jax.lax.associative_scan(later, (says, (lead > 0) & says), axis=1, reverse=True)
    newline_next = jnp.pad(first, ((0, 0), (0, 1)))[:, 1:]

    closes_earlier = ~only & (lead > 0) & (before + lead >= 2)
    closes_here = (run >= 2) & (trail > 0) & ~newline_next
    ends = (inner | closes_earlier | closes_here) & real

    segment = jnp.cumsum(ends, axis=1) - ends  # raw steps, blank ones included
    far = tokens.shape[1] + 1
    next_text = jax.lax.cummin(jnp.where(blank, far, segment), axis=1, reverse=True)
    has_text = next_text == segment
    opens = jnp.pad(ends, ((0, 0), (1, 0)))[:, :-1] | (at == 0)
    text_before = jnp.cumsum(~blank, axis=1) - ~blank > 0
    any_text = jnp.any(~blank, axis=1, keepdims=True)
    starts = ((opens & has_text & text_before) | (at == 0)) & real & any_text
    index = jnp.cumsum(starts, axis=1) - 1
    return Steps(jnp.where(at < length[:, None], index, -1), starts, jnp.sum(starts, axis=1))
