"""Bootstrap intervals."""

import numpy as np

QUANTILES = (0.025, 0.975)


def interval(values: np.ndarray, resamples: int, seed: int) -> list[float]:
    """95 % percentile-bootstrap interval of the mean over problems: values [problems] -> [low, high].

    Resampling problems (not samples) keeps the dependence between the samples of one problem.
    """
    rng = np.random.default_rng([seed, len(values)])
    means = values[rng.integers(0, len(values), size=(resamples, len(values)))].mean(axis=1)
    return [float(x) for x in np.quantile(means, QUANTILES)]


def crossed(values: np.ndarray, resamples: int, seed: int) -> list[float]:
    """The same where every seed has every problem: values [seeds, problems] -> [low, high].

    Seeds and problems are resampled apart (the pigeonhole bootstrap: Owen 2007, doi 10.1214/07-AOAS122): a problem that
    is easy for all seeds does not count as often as there are seeds, and their own chance is in the interval, too. With
    one seed only problems are.
    """
    rng = np.random.default_rng([seed, values.shape[1]])
    seeds, problems = values.shape
    drawn = rng.multinomial(problems, [1 / problems] * problems, size=resamples)  # how often each problem counts
    of_seeds = rng.multinomial(seeds, [1 / seeds] * seeds, size=resamples)
    means = np.einsum("rs,sp,rp->r", of_seeds, values, drawn) / (seeds * problems)
    return [float(x) for x in np.quantile(means, QUANTILES)]
