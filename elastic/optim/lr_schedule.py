"""The learning rate as a pure function of the tokens seen. No torch here."""

import math

from elastic.config import OptimConfig


def learning_rate(config: OptimConfig, tokens: float, total_tokens: float) -> float:
    """Return the learning rate of the update that brings the run to `tokens` target tokens.

    Counting the update's own tokens gives the first update more than 0 and the last one exactly the minimum.

    Warm-up is linear from 0. Then `cosine` falls to `min_lr_ratio * lr` over the rest (Source: arXiv:1608.03983),
    while `wsd` stays at `lr` and falls only over the last `decay_tokens`, linearly or as 1 - sqrt(x)
    (Source: MiniCPM, arXiv:2404.06395; Haegele et al., arXiv:2405.18392, section 3).
    """
    if tokens < config.warmup_tokens:
        return config.lr * tokens / config.warmup_tokens
    if config.schedule == "cosine":
        share = (1 + math.cos(math.pi * _progress(tokens, config.warmup_tokens, total_tokens))) / 2
    else:
        decay_tokens = config.decay_tokens or total_tokens // 5
        decayed = _progress(tokens, max(config.warmup_tokens, total_tokens - decay_tokens), total_tokens)
        share = 1 - (math.sqrt(decayed) if config.decay_shape == "sqrt" else decayed)
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * share)


def _progress(tokens: float, start: float, end: float) -> float:
    """Return how far `tokens` is from `start` (0) to `end` (1), clamped."""
    if tokens >= end:
        return 1.0
    return max(0.0, (tokens - start) / (end - start))
