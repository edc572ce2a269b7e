"""The table of flags: one entry per name, whichever script has it."""

import os
from typing import Any

import attacks
from experiment.cli.values import fraction, model_name, number, positive_int, run_name, switch, whole

ALIASES = {
    "BDM": "Wang2023Better_WRN-28-10",
    "DEC": "Cui2023Decoupled_WRN-28-10",
    "LTD": "Chen2021LTD_WRN34_10",
}
"""The papers' short names of RobustBench models, of CIFAR-100 and of CIFAR-10."""

METHOD_FLAGS: dict[str, dict[str, Any]] = {
    "teacher": {
        "help": "BDM, DEC, LTD, any RobustBench Linf name for the data, a checkpoint, run folder or architecture"
    },
    "student": {"type": model_name, "help": "RES-18, MN-V2, RES-20, RES-8, WRN-d-w, or FILE.py:function"},
    "epochs": {"type": positive_int, "help": "number of epochs"},
    "batch": {"type": positive_int, "help": "images per optimizer step, over all GPUs together"},
    "lr": {"type": number(above=True), "help": "learning rate of SGD"},
    "momentum": {"type": number(0, 1), "help": "momentum of SGD"},
    "wd": {"type": number(), "help": "weight decay; the released code's is 2e-4"},
    "lr_milestones": {
        "type": positive_int,
        "nargs": "*",
        "help": "epochs after which lr is divided by 10; default 1/2 and 3/4 of the epochs",
    },
    "epsilon": {"type": fraction, "help": "Linf budget, pixels in [0, 1]"},
    "step_size": {"type": fraction, "help": "attack step, pixels in [0, 1]"},
    "steps": {"type": positive_int, "help": "attack steps"},
    "attack": {
        "choices": attacks.INNER_MAXIMISATIONS,
        "help": "inner maximisation, by attacks.perturb; the default is the method's own",
    },
    "objective": {"choices": ("TRADES", "PGD-AT"), "help": "adversarial training objective"},
    "trades_weight": {"type": number(), "help": "weight of TRADES' robust term (1/lambda in its paper)"},
    "target": {"choices": ("adversarial", "clean"), "help": "teacher's target: T(x_adv) or T(x)"},
    "ce_weight": {"type": number(), "help": "lambda, the weight of CE(S(x_adv), y)"},
    "clean_weight": {"type": number(0, 1), "help": "share of the clean term KL(T(x) || S(x)); 1/6 in the paper"},
    "loss_scale": {"type": number(above=True), "help": "factor on the base loss; 0.1 in the paper"},
    "alpha": {"type": number(), "help": "weight of the IGDM term when its ramp is complete"},
    "beta": {"type": number(), "help": "the plus point is x + beta delta"},
    "gamma": {"type": number(), "help": "the minus point is x - gamma delta"},
    "ramp_epochs": {"type": positive_int, "help": "the IGDM term's weight is alpha * epoch / ramp_epochs"},
}
"""Flags of the scripts whose RECIPE has the key; the default is the recipe's."""

RUN_FLAGS: dict[str, dict[str, Any]] = {
    "dataset": {
        "default": "cifar100",
        "help": "cifar100, cifar10, svhn, digits (in scikit-learn), an .npz file, or a folder of images",
    },
    "data_dir": {
        "type": os.path.expanduser,
        "default": "data",
        "help": "where CIFAR and SVHN lie or are downloaded to",
    },
    "side": {
        "type": whole(0),
        "default": 0,
        "help": "reduce the images to N x N pixels, each the mean of a block; 0 leaves them as they are",
    },
    "train_examples": {
        "type": whole(0),
        "default": 0,
        "help": "train on so many of the training images, in the classes' shares, always the same ones; 0 for all",
    },
    "holdout": {
        "type": whole(0),
        "default": 0,
        "help": "training images to set aside, in the classes' shares, and to measure PGD-10 on; 0 for none",
    },
    "eval_after": {
        "type": whole(0),
        "default": 90,
        "help": "clean and PGD-20 accuracy in every epoch after this one, and in the last",
    },
    "aa_examples": {
        "type": whole(0),
        "default": 10_000,
        "help": "test images for AutoAttack (standard) at the end; 0: none",
    },
    "aa_batch": {
        "type": positive_int,
        "default": 250,
        "help": "images per AutoAttack chunk; random draws and resume go by chunks",
    },
    "aa_best": {
        "type": switch,
        "metavar": "{0,1}",
        "default": 0,
        "help": "1 runs AutoAttack on the best epoch of --holdout too",
    },
    "swa_after": {
        "type": whole(0),
        "default": 0,
        "help": "average the weights of the epochs after this one and measure the average too; 0 for none",
    },
    "seed": {"type": whole(0), "default": 0, "help": "seed of weights, order, augmentation, attacks and AutoAttack"},
    "device": {"default": "auto", "help": "auto, cpu, cuda or cuda:N"},
    "precision": {
        "choices": ("fp32", "tf32", "bf16"),
        "help": "default fp32 on the CPU, tf32 on CUDA; bf16 doubles a CPU's speed where it has instructions for it",
    },
    "compile": {"type": switch, "metavar": "{0,1}", "default": 0, "help": "torch.compile the networks"},
    "deterministic": {
        "type": switch,
        "metavar": "{0,1}",
        "default": 0,
        "help": "bit-identical runs on CUDA too, slower",
    },
    "stop_on_collapse": {
        "type": switch,
        "metavar": "{0,1}",
        "default": 1,
        "help": "0 trains on with a student that predicts one class only, as very unequal classes may ask for",
    },
    "checkpoint_minutes": {
        "type": number(above=True),
        "default": 10.0,
        "help": "most minutes of training that a kill can lose",
    },
    "run_dir": {"type": os.path.expanduser, "default": "runs", "help": "folder of the run folders"},
    "run_name": {
        "type": run_name,
        "help": "name of the run folder; default made of script, dataset, teacher, student, seed",
    },
    "nowand": {
        "type": switch,
        "metavar": "{0,1}",
        "nargs": "?",
        "const": 1,
        "default": 1,
        "help": "the released code's flag: --nowand 0 is --wandb 1",
    },
    "wandb": {
        "type": switch,
        "metavar": "{0,1}",
        "nargs": "?",
        "const": 1,
        "help": "1 logs the metrics to Weights & Biases (default: 0)",
    },
    "wandb_project": {"default": "robust-distillation", "help": "W&B project"},
    "wandb_entity": {"default": None, "help": "W&B entity"},
    "wandb_name": {"default": None, "help": "W&B run name; default the run folder's"},
    "wandb_tags": {"nargs": "*", "default": [], "help": "W&B tags"},
    "wandb_artifact": {
        "type": switch,
        "metavar": "{0,1}",
        "default": 0,
        "help": "1 uploads the final student to Weights & Biases",
    },
    "tensorboard": {
        "type": switch,
        "metavar": "{0,1}",
        "default": 0,
        "help": "1 mirrors the metrics to TensorBoard, in the run folder",
    },
}
"""Flags of every training script."""

NAMED_RUN_FLAGS = ("side", "train_examples", "holdout", "swa_after", "compile", "deterministic")
"""Flags of these that a default run name tells where they are not the default; the rest moves no weight."""

_LATER = (
    "side", "train_examples", "holdout", "aa_best", "swa_after", "stop_on_collapse", "wandb_artifact", "tensorboard",
)  # fmt: skip
LATER_SETTINGS: dict[str, Any] = {name: RUN_FLAGS[name]["default"] for name in _LATER}
"""Settings that the config.json of an earlier version lacks, and the values that stand for what it did."""
