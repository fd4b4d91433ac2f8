"""Easy, Medium and Hard mAP as AMES and LOCORE compute them: trapezoids, divided by min(positives, ranks given)."""
import numpy as np

from patchify.metrics import average_precisions
from patchify.retrieval_set import revisited_setups


def easy_medium_hard(ranks, easy, hard, junk):
    return [np.nanmean(average_precisions(ranks, positives, bad, ranks.shape[1], "trapezoid")) for positives, bad in revisited_setups(easy, hard, junk).values()]


def mean_of_medium_and_hard(ranks, easy, hard, junk):
    return np.mean(easy_medium_hard(ranks, easy, hard, junk)[1:])
