"""What a network withstands: clean, FGSM, PGD-20, C&W and AutoAttack accuracy, and gradient alignment.

Conventions of every public function here:
    x is (N, C, H, W), uint8 or float in [0, 1]; y is (N,) int64; both on any device, moved batch by batch to the
    network's. Accuracies are fractions of N. Networks compute in float32 (autocast is switched off; TF32 stays as the
    process has it), in eval mode with frozen parameters; modes and requires_grad are restored, no ``.grad`` is touched,
    and the global random generators end as they began: random starts come from `seed` alone.
    With torch.distributed initialised, every rank must call with the same arguments: batches (for AutoAttack, chunks)
    are split over the ranks and every rank gets the merged result. Each batch has a random stream of its own, so that
    the result does not depend on the number of ranks.
"""

from experiment.evaluation.accuracy import accuracy, cw_accuracy, fgsm_accuracy, monitor, pgd_accuracy
from experiment.evaluation.alignment import GRADIENT_DEFINITION, gradient_alignment
from experiment.evaluation.chunks import AUTOATTACK
from experiment.evaluation.driver import autoattack
from experiment.evaluation.flags import wilson_interval

__all__ = [
    "AUTOATTACK",
    "GRADIENT_DEFINITION",
    "accuracy",
    "autoattack",
    "cw_accuracy",
    "fgsm_accuracy",
    "gradient_alignment",
    "monitor",
    "pgd_accuracy",
    "wilson_interval",
]
