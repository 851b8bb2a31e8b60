"""Bootstrap intervals."""

import numpy as np


def interval(values: np.ndarray, resamples: int, seed: int) -> list[float]:
    """95 % percentile-bootstrap interval of the mean over problems: values [problems] -> [low, high].

    Resampling problems (not samples) keeps the dependence between the samples of one problem.
    """
    rng = np.random.default_rng([seed, len(values)])
    means = values[rng.integers(0, len(values), size=(resamples, len(values)))].mean(axis=1)
    return [float(x) for x in np.quantile(means, [0.025, 0.975])]
