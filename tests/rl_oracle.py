"""The losses of jaxlab.rl in plain Python numbers, as the peers' formulas read, and slopes by differences."""

import math

import numpy as np


def clip(x, low, high):
    return min(max(x, low), high)


def log_ratios(lp, frozen, old, valid, level, clamp):
    """The log ratio of each valid token of a row; `frozen` is lp without gradient."""
    moved = [lp[t] - old[t] for t in valid]
    still = [frozen[t] - old[t] for t in valid]
    if level == "token":
        z = moved
    elif level == "sequence":
        z = [sum(moved) / len(moved)] * len(moved)
    elif level == "sequence_sum":
        z = [sum(moved)] * len(moved)
    else:
        z = [sum(still) / len(still) + lp[t] - frozen[t] for t in valid]
    return z if clamp is None else [clip(x, -clamp, clamp) for x in z]


def policy_row(lp, frozen, old, adv, valid, c):
    """{token: loss} of a row and the tokens clipped, dually clipped."""
    z = log_ratios(lp, frozen, old, valid, c.ratio_level, c.log_ratio_clamp)
    z0 = log_ratios(frozen, frozen, old, valid, c.ratio_level, c.log_ratio_clamp)
    out, clipped, dual = {}, set(), set()
    if c.kind == "gmpo":
        logs = []
        for t in valid:
            d = lp[t] - old[t]
            sign = np.sign(adv[t])
            logs.append(sign * min(sign * d, sign * clip(d, -c.eps_low, c.eps_high)))
            if clip(d, -c.eps_low, c.eps_high) != d:
                clipped.add(t)
        mean = sum(logs) / len(logs)
        if c.log_ratio_clamp is not None:
            mean = clip(mean, -c.log_ratio_clamp, c.log_ratio_clamp)
        a = sum(adv[t] for t in valid) / len(valid)
        return {t: -a * math.exp(mean) for t in valid}, clipped, dual
    for t, x, x0 in zip(valid, z, z0, strict=True):
        a, r, r0 = adv[t], math.exp(x), math.exp(x0)
        low, high = 1 - c.eps_low, 1 + c.eps_high
        if c.kind == "pg":
            out[t] = -a * lp[t]
        elif c.kind == "cispo":
            out[t] = -clip(r0, low, high) * a * lp[t]
            if clip(r0, low, high) != r0:
                clipped.add(t)
        elif c.kind == "sapo":
            tau = c.tau_pos if a > 0 else c.tau_neg
            out[t] = -a / (1 + math.exp(-tau * (r - 1))) * 4 / tau
        else:
            free = -a * (r if c.ratio_cap is None else min(r, c.ratio_cap))
            bounded = -a * clip(r, low, high)
            loss = max(free, bounded)
            if bounded > free:
                clipped.add(t)
            if c.dual_clip is not None and a < 0 and loss > -a * c.dual_clip:
                dual.add(t)
                loss = -a * c.dual_clip
            out[t] = loss
    return out, clipped, dual


def kl_token(d, d_frozen, kind, clamp):
    def value(d, kind):
        k = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d, "abs": abs(d)}[kind]
        return k if clamp is None else clip(k, -clamp, clamp)

    if kind.endswith("_st"):
        return value(d_frozen, kind[:2]) + d * d / 2 - d_frozen * d_frozen / 2
    return value(d, kind)


def mean(tokens, rows, c):
    """Numerator and denominator of {(i, t): x} over rows {i: valid tokens}."""
    filled = [i for i, valid in rows.items() if valid]
    count = len(rows) if c.rows == "all" else len(filled)
    total = sum(tokens.values())
    if c.mode == "token_mean":
        return total, len(tokens)
    if c.mode == "seq_mean_token_mean":
        return sum(sum(tokens[i, t] for t in rows[i]) / len(rows[i]) for i in filled), count
    if c.mode == "seq_mean_token_sum":
        return total, count
    if c.mode == "seq_mean_token_scale":
        return total, count * c.max_len
    return total, c.max_len


def loss(lp, frozen, batch, c, entropy):
    """(loss, metrics) of `rl_loss`; what has no gradient reads `frozen`."""
    n, t = lp.shape
    rows = {i: [j for j in range(t) if batch["mask"][i][j]] for i in range(n)}
    adv = np.broadcast_to(np.reshape(batch["adv"], (n, -1)), (n, t))
    old, tokens = batch["logp_old"], {}
    sums = dict.fromkeys(
        ("clip_frac", "clip_frac_low", "clip_frac_high", "dual_clip_frac", "approx_kl", "kl"), 0.0
    )
    for i, valid in rows.items():
        if not valid:
            continue
        losses, clipped, dual = policy_row(lp[i], frozen[i], old[i], adv[i], valid, c)
        z = log_ratios(lp[i], frozen[i], old[i], valid, c.ratio_level, c.log_ratio_clamp)
        for j, x in zip(valid, z, strict=True):
            value = losses[j]
            if c.sampler_cap is not None:
                value *= min(math.exp(old[i, j] - batch["logp_sampler"][i, j]), c.sampler_cap)
            if "logp_ref" in batch:
                ref = batch["logp_ref"][i, j]
                kl = kl_token(lp[i, j] - ref, frozen[i, j] - ref, c.kl, c.kl_clamp)
                kl *= math.exp(x) if c.kl_times_ratio else 1
                value += c.kl_coef * kl
                sums["kl"] += kl
            if entropy is not None:
                value -= c.entropy_coef * entropy[i, j]
            tokens[i, j] = value
            drift = lp[i, j] - old[i, j]
            if c.log_ratio_clamp is not None:
                drift = clip(drift, -c.log_ratio_clamp, c.log_ratio_clamp)
            sums["approx_kl"] -= drift
        sums["clip_frac"] += len(clipped)
        sums["clip_frac_low"] += sum(adv[i, j] < 0 for j in clipped)
        sums["clip_frac_high"] += sum(adv[i, j] > 0 for j in clipped)
        sums["dual_clip_frac"] += len(dual)
    numerator, denominator = mean(tokens, rows, c)
    denominator = batch.get("denominator", denominator)
    return (numerator / denominator if denominator else 0.0), sums, (numerator, denominator)


def slope(fn, x, step=1e-6):
    """Gradient of fn, a number from an array, by central differences."""
    out = np.zeros_like(x)
    for at in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[at] += step
        down[at] -= step
        out[at] = (fn(up) - fn(down)) / (2 * step)
    return out
