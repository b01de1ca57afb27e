"""GSPO: the clipped objective with one ratio per response. Zheng et al., arXiv 2507.18071."""

from __future__ import annotations

from rlinf_lite.algorithms.algorithm import LossInputs
from rlinf_lite.algorithms.losses.actor import clipped
from rlinf_lite.algorithms.objective import TokenLosses
from rlinf_lite.algorithms.reduce import Responses
from rlinf_lite.config import AlgorithmConfig
from rlinf_lite.types import Column

_MAX_LOG_RATIO = 20.0


def token_losses(inputs: LossInputs, config: AlgorithmConfig) -> TokenLosses:
    """Clip s = exp(mean of logprob - old logprob over the response), the geometric mean of the ratios of its tokens.

    A token's ratio is s * p / stop_gradient(p) (GSPO-token, section 4.3 of the paper): its value is s for every token
    of the response, and its gradient is s * A * grad log p, with the advantage of the token itself. If all advantages
    of a response are equal, that is GSPO.
    """
    logprob_M = inputs.logprob_M
    assert logprob_M is not None
    now_M, responses = logprob_M.detach(), Responses(inputs.seq_M, inputs.num_responses)
    log_s_R = responses.means(now_M - inputs.columns[Column.OLD_LOGPROB]).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    ratio_M = responses.of_tokens(log_s_R.exp()) * (logprob_M - now_M).exp()
    return clipped(ratio_M, inputs.columns[Column.ADVANTAGE], config)
