"""How far to trust an estimate: cheap checks of the weights behind it, in NumPy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from scipy.special import expit, log_expit, logsumexp

from freeflow.errors import InputError
from freeflow.estimators.two_state import ESTIMATORS, Estimator, Samples, bar, bennett_shift, fep, record, samples_of
from freeflow.types import Estimate, Work

# Thresholds of `reliability`. With Gaussian work of variance up to 1 and 200 samples or more they
# raise fewer than one false alarm in a thousand runs.
MIN_EFFECTIVE_SAMPLES = 50.0
MIN_ESS_FRACTION = 0.01
MAX_WEIGHT_SHARE = 0.1
MAX_Z = 4.0
MAX_ERROR_RATIO = 1.5
MIN_OVERLAP = 0.03
_BOUNDED = 0.5  # overlap from which on a Fermi function is at most about four times its mean
_PARETO_PRIOR = 10  # pseudo-observations at k = 1/2
_CHUNK = 1 << 22  # random numbers in memory at a time


@dataclass(frozen=True)
class Diagnostics:
    """What `reliability` judges by. Numbers are NaN, or None for two-sided ones, if not applicable."""

    estimator: str
    n_samples: int  # that the estimator used, both directions together
    n_invalid: int  # work values that are NaN or minus infinity
    effective_samples: float  # Kish, on the worse side, divided by the statistical inefficiency
    ess_fraction: float
    pareto_k: float
    hill_k: float
    overlap: float | None
    largest_weight_share: float
    drift_z: float
    hysteresis_z: float | None
    bootstrap_std_error: float  # [kT]


def _weights(log_weights: Samples) -> np.ndarray:
    """Weights of shape (n,) scaled to a largest of 1."""
    log_w = np.asarray(samples_of(log_weights, "log_weights"))
    top = np.max(log_w)
    return np.exp(log_w - (top if np.isfinite(top) else 0.0))


def effective_sample_size(log_weights: Samples) -> float:
    """Kish's (sum w)^2 / sum w^2 of log weights (n,), between 1 and n."""
    w = _weights(log_weights)
    return float(np.sum(w) ** 2 / np.sum(w**2)) if np.any(w) else math.nan


def largest_weight_share(log_weights: Samples) -> float:
    """Share of the largest of the weights (n,) in their sum."""
    w = _weights(log_weights)
    return float(np.max(w) / np.sum(w)) if np.any(w) else math.nan


def _tail_size(n: int) -> int:
    return math.ceil(min(0.2 * n, 3 * math.sqrt(n)))


def pareto_k(log_weights: Samples) -> float:
    """Shape of the generalised Pareto tail of the weights (n,); moments above 1/k do not exist.

    The tail is what exceeds the (m + 1)-th largest weight, m = min(n / 5, 3 sqrt(n)). NaN if
    fewer than 5 weights do, which ties can cause; 0 if all weights are equal: no tail at all.

    References: Zhang and Stephens, Technometrics 51, 316 (2009); Vehtari, Simpson, Gelman, Yao
        and Gabry, JMLR 25, 72 (2024), with its weak prior.
    """
    w = np.sort(_weights(log_weights))
    if np.any(np.isnan(w)) or not np.any(w):
        return math.nan
    if w[0] == w[-1]:
        return 0.0
    m = _tail_size(w.size)
    if m >= w.size:
        return math.nan
    x = w[-m:] - w[-m - 1]
    x = x[x > 0]
    n = x.size
    if n < 5:
        return math.nan
    x = x / x[-1]
    grid = np.arange(1, 31 + math.isqrt(n)) - 0.5
    # theta of Zhang and Stephens, whose prior is centred on the first quartile of the tail.
    theta = 1 + (1 - np.sqrt((30 + math.isqrt(n)) / grid)) / (3 * x[int(n / 4 + 0.5) - 1])
    shape = np.log1p(-theta[:, None] * x).mean(axis=1)
    log_likelihood = n * (np.log(-theta / shape) - shape - 1)
    posterior = np.exp(log_likelihood - logsumexp(log_likelihood))
    k = np.log1p(-np.sum(posterior * theta) * x).mean()
    return float((n * k + 0.5 * _PARETO_PRIOR) / (n + _PARETO_PRIOR))


def hill_k(log_weights: Samples) -> float:
    """Hill's estimate of the tail shape of the weights (n,): mean excess of the log weights in the tail.

    It has half the noise of `pareto_k` where the tail is a power law, as for a mode that is softer
    in the target than in the reference, and unlike it depends on the scale of the work. Same tail
    and NaN as `pareto_k`; 0 if all weights are equal.

    References: Hill, Ann. Statist. 3, 1163 (1975).
    """
    log_w = np.sort(np.asarray(samples_of(log_weights, "log_weights")))
    m = _tail_size(log_w.size)
    if m < 5 or m >= log_w.size or not np.isfinite(log_w[-m - 1]):
        return math.nan
    return float(np.mean(log_w[-m:]) - log_w[-m - 1])


def _heavy_tail(pareto: float, hill: float, n: float) -> bool:
    """Whether n weights look as if they had no variance (k > 1/2), which a plain average needs.

    The usual 0.7 is for Pareto-smoothed averages. The terms that fall with n are what chance does with
    Gaussian work of variance 1: each is exceeded about twice in 10 000 runs.
    """
    return pareto > 0.5 + 6.4 / math.sqrt(n) or hill > 0.6 + 60 / n


def overlap(work: Work) -> float | None:
    """Overlap of the two states between 0 and 1; None without reverse work.

    One minus the second eigenvalue of the two-state MBAR overlap matrix, which is the sum of its
    off-diagonal elements and does not depend on how the samples are shared out.

    References: Klimovich, Shirts and Mobley, J. Comput. Aided Mol. Des. 29, 397 (2015).
    """
    n_f, n_r = len(work.forward), len(work.reverse)
    if n_r == 0:
        return None
    shift = bennett_shift(work, float(bar(work).delta_f))
    x = np.concatenate([shift - np.asarray(work.forward), shift + np.asarray(work.reverse)])
    return float(np.sum(expit(x) * expit(-x)) * (1 / n_f + 1 / n_r))


def drift(work: Work, estimator: Estimator = fep) -> float:
    """Difference of the second half's estimate from the first's, in standard errors.

    NaN with fewer than two samples in each half; infinite if both error bars are zero and the
    answers differ.
    """
    f, r = np.asarray(work.forward), np.asarray(work.reverse)
    if len(f) < 4 or 0 < len(r) < 4:
        return math.nan
    first = estimator(record(f[: len(f) // 2], r[: len(r) // 2]))
    second = estimator(record(f[len(f) // 2 :], r[len(r) // 2 :]))
    if not (np.isfinite(first.delta_f) and np.isfinite(second.delta_f)):
        return float("nan")
    return _z(float(second.delta_f - first.delta_f), float(np.hypot(first.std_error, second.std_error)))


def hysteresis(work: Work, inefficiency: tuple[float, float] = (1.0, 1.0)) -> float | None:
    """Largest z-score, with its sign, between forward FEP, reverse FEP and BAR; None without reverse work.

    A one-sided estimate takes part if it has 100 effective samples and no heavy tail: otherwise its
    error bar is too small, and BAR may be sound where both of them are hopeless. Forward minus BAR,
    forward minus reverse and BAR minus reverse are positive when the one-sided averages have not
    converged; a large negative value says that the two sets of samples contradict each other. NaN
    if there is nothing to compare.
    """
    if len(work.reverse) == 0:
        return None
    answers = []
    for w, sign, g in ((work.forward, 1, inefficiency[0]), (work.reverse, -1, inefficiency[1])):
        one_sided = fep(record(w))
        log_w, n = -np.asarray(w), len(w) / g
        if one_sided.ess_fraction * n >= 2 * MIN_EFFECTIVE_SAMPLES and not _heavy_tail(
            pareto_k(log_w), hill_k(log_w), n
        ):
            answers.append((sign, sign * float(one_sided.delta_f), float(one_sided.std_error) * math.sqrt(g)))
    both = bar(work, inefficiency)
    # BAR is correlated with either side, so that adding the variances is on the safe side.
    answers.insert(len([a for a in answers if a[0] > 0]), (0, float(both.delta_f), float(both.std_error)))
    pairs = [(a, b) for i, a in enumerate(answers) for b in answers[i + 1 :]]
    return max((_z(a[1] - b[1], math.hypot(a[2], b[2])) for a, b in pairs), key=abs, default=math.nan)


def _z(difference: float, error: float) -> float:
    if error == 0:
        return 0.0 if difference == 0 else math.copysign(math.inf, difference)
    return difference / error


def _sides(work: Work, estimator: str, delta_f: float, inefficiency: tuple[float, float]):
    """(log weights, g) of every average that the estimator takes the logarithm of."""
    if estimator == "fep":
        return [(-np.asarray(work.forward), inefficiency[0])]
    shift = bennett_shift(work, delta_f, inefficiency)
    return [
        (log_expit(shift - np.asarray(work.forward)), inefficiency[0]),
        (log_expit(-shift - np.asarray(work.reverse)), inefficiency[1]),
    ]


def bootstrap(
    estimator: Estimator,
    work: Work,
    seed: int | jax.Array,
    n_resamples: int = 200,
    inefficiency: tuple[float, float] = (1.0, 1.0),
) -> float:
    """Bootstrap standard error [kT]; NaN for fewer than two samples.

    `fep` and `bar` resample the averages that they are made of, all at once; BAR's constant C
    stays fixed, which matters at second order only. Any other estimator is called once per resample.

    Args:
        estimator: One of `ESTIMATORS`, or any function of work.
        work: Forward and reverse work.
        seed: An integer or a JAX random key.
        n_resamples: Number of resamples.
        inefficiency: Statistical inefficiency of forward and reverse samples; resamples have n / g members.

    References: Efron, Ann. Statist. 7, 1 (1979).
    """
    if not isinstance(seed, int | np.integer):
        seed = [int(word) for word in np.ravel(jax.random.key_data(seed))]  # pyright: ignore[reportAssignmentType]
    rng = np.random.default_rng(seed)  # pyright: ignore[reportArgumentType]
    used = (work.forward, work.reverse) if estimator is bar else (work.forward,)
    if min(len(w) for w in used) < 2:
        return math.nan
    name = next((key for key, value in ESTIMATORS.items() if value is estimator), None)
    if name is None:
        f, r = np.asarray(work.forward), np.asarray(work.reverse)
        sizes = [max(1, round(len(w) / g)) if len(w) else 0 for w, g in zip((f, r), inefficiency, strict=True)]
        values = [
            float(estimator(record(rng.choice(f, sizes[0]), rng.choice(r, sizes[1]) if sizes[1] else r)).delta_f)
            for _ in range(n_resamples)
        ]
        return float(np.std(values, ddof=1))
    delta_f = float(bar(work, inefficiency).delta_f) if name == "bar" else 0.0
    variance = 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        for log_weights, g in _sides(work, name, delta_f, inefficiency):
            w = _weights(log_weights)
            size = max(1, round(w.size / g))
            rows = max(1, _CHUNK // size)
            means = [
                w[rng.integers(0, w.size, (min(rows, n_resamples - done), size))].mean(axis=1)
                for done in range(0, n_resamples, rows)
            ]
            variance += np.var(np.log(np.concatenate(means)), ddof=1)
    return float(np.sqrt(variance))


def diagnose(
    work: Work, estimator_name: str = "fep", inefficiency: tuple[float, float] = (1.0, 1.0), seed: int = 0
) -> Diagnostics:
    """Everything that `reliability` needs to know about an estimate.

    The weights are exp(-w) for "fep", and for "bar" the Fermi functions on the side that is worse off.

    Args:
        work: Forward and reverse work [kT].
        estimator_name: A key of `ESTIMATORS`.
        inefficiency: Statistical inefficiencies of the forward and of the reverse work.
        seed: Of the bootstrap.

    Raises:
        InputError: If the estimator is unknown, or a direction that it needs has zero samples.
        PrecisionError: If the work is not float64.
    """
    if estimator_name not in ESTIMATORS:
        raise InputError(f"no estimator {estimator_name!r}; use one of {', '.join(ESTIMATORS)}")
    work = record(np.asarray(samples_of(work.forward, "forward work")), np.asarray(work.reverse))
    estimator = partial(bar, inefficiency=inefficiency) if estimator_name == "bar" else fep
    answer = estimator(work)
    used = np.concatenate(work if estimator_name == "bar" else work[:1])
    n_invalid = int(np.sum(np.isnan(used) | np.isneginf(used)))
    if n_invalid:
        nan = math.nan
        return Diagnostics(estimator_name, used.size, n_invalid, nan, nan, nan, nan, None, nan, nan, None, nan)
    sides = _sides(work, estimator_name, float(answer.delta_f), inefficiency)
    worst, g = min(sides, key=lambda side: effective_sample_size(side[0]) / side[1])
    ess = effective_sample_size(worst)
    two_sided = bool(np.all(np.isfinite(work.reverse)))
    return Diagnostics(
        estimator=estimator_name,
        n_samples=used.size,
        n_invalid=0,
        effective_samples=ess / g,
        ess_fraction=ess / worst.size,
        pareto_k=pareto_k(worst),
        hill_k=hill_k(worst),
        overlap=overlap(work) if two_sided else None,
        largest_weight_share=largest_weight_share(worst),
        drift_z=drift(work, estimator),
        hysteresis_z=hysteresis(work, inefficiency) if two_sided else None,
        bootstrap_std_error=bootstrap(ESTIMATORS[estimator_name], work, seed, inefficiency=inefficiency),
    )


def reliability(diagnostics: Diagnostics, estimate: Estimate) -> tuple[str, ...]:
    """Why not to trust the estimate, one plain sentence each; empty if there is no reason.

    n below is the number of independent samples behind the worst average.

    - NaN or minus infinity among the work values, or no finite answer or error bar;
    - fewer effective samples than n / 20, but at least 10 and at most 50 are asked for; or than n / 100;
    - a heavy tail: Pareto k above 0.5 + 6.4 / sqrt(n), or Hill's k above 0.6 + 60 / n; not with BAR where the states
      overlap by half or more, since its weights have an upper bound that is near then;
    - one sample with more than 0.1 + 45 / n of the weight;
    - halves, or directions, that differ by more than 4 standard errors;
    - analytic and bootstrap error bars that differ by a factor of more than 1.5;
    - overlap below 0.03 (BAR).
    """
    d = diagnostics
    if d.n_invalid:
        return (f"{d.n_invalid} of {d.n_samples} work values are NaN or minus infinity",)
    error, reasons = float(estimate.std_error), []
    if not (math.isfinite(float(estimate.delta_f)) and math.isfinite(error)):
        return (f"no finite answer or error bar can be estimated from {d.n_samples} samples",)
    n = d.effective_samples / d.ess_fraction
    if d.effective_samples < max(10.0, min(MIN_EFFECTIVE_SAMPLES, n / 20)) or d.ess_fraction < MIN_ESS_FRACTION:
        reasons.append(f"only {d.effective_samples:.1f} effective samples: the answer may be biased")
    near_bound = d.estimator == "bar" and d.overlap is not None and d.overlap >= _BOUNDED
    if not near_bound and _heavy_tail(d.pareto_k, d.hill_k, n):
        shapes = f"Pareto k {d.pareto_k:.2f}, Hill k {d.hill_k:.2f}"
        reasons.append(f"the weights have a heavy tail ({shapes}): the error bar may be too small")
    if d.largest_weight_share > MAX_WEIGHT_SHARE + 45 / n:
        reasons.append(f"one sample carries {100 * d.largest_weight_share:.0f} % of the weight")
    if abs(d.drift_z) > MAX_Z:
        reasons.append(f"first and second half of the samples differ by {abs(d.drift_z):.1f} standard errors")
    if d.hysteresis_z is not None and abs(d.hysteresis_z) > MAX_Z:
        reasons.append(f"forward and reverse estimates differ by {abs(d.hysteresis_z):.1f} standard errors")
    low, high = sorted((error, d.bootstrap_std_error))
    if high > MAX_ERROR_RATIO * low and high > 1e-12:
        reasons.append(f"the bootstrap error bar is {d.bootstrap_std_error:.2g} kT, the analytic one {error:.2g} kT")
    if d.estimator == "bar" and d.overlap is not None and d.overlap < MIN_OVERLAP:
        reasons.append(f"the two states overlap by {100 * d.overlap:.1f} % only; put states or stages between them")
    return tuple(reasons)
