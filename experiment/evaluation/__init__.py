"""Clean accuracy, robust accuracy under FGSM, PGD-20, C&W and AutoAttack, and gradient alignment.

Conventions of every public function here:
    x is (N, C, H, W), uint8 or float in [0, 1]; y is (N,) int64; both on any device, and moved to the network's device
    in batches. Accuracies are fractions of N. Networks compute in float32 (autocast is off, TF32 is unchanged), in eval
    mode with frozen parameters. Modes, requires_grad, ``.grad`` and the global random generators are left unchanged:
    random starts depend on `seed` only.
    With torch.distributed initialised, every rank must call with the same arguments. Batches (for AutoAttack, chunks)
    are distributed over the ranks, and every rank gets the merged result. Each batch has its own random stream, so that
    the result does not depend on the number of ranks.
"""

from experiment.evaluation.accuracy import (
    MONITOR_PASSES,
    accuracy,
    accuracy_curve,
    autoattack_curve,
    beside_torchattacks,
    monitor,
    per_class,
    pgd_accuracy,
)
from experiment.evaluation.alignment import GRADIENT_DEFINITION, gradient_alignment, gradient_report
from experiment.evaluation.autoattack import AUTOATTACK, autoattack, autoattack_label
from experiment.evaluation.batches import check_network, wilson_interval
from experiment.evaluation.record import (
    alignment_figure,
    check_outputs,
    curve_figure,
    differences,
    record_text,
    records,
    save_adversarial,
    write_record,
)
