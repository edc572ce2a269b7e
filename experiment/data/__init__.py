"""Data sets: load_data gives one whole, on the training device; Data hands out augmented batches."""

from experiment.data.augmentation import as_float, augment
from experiment.data.sets import Data, check_dataset, load_data, selection

__all__ = ["Data", "as_float", "augment", "check_dataset", "load_data", "selection"]
