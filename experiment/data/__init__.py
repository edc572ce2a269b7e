"""Data sets: load_data loads one onto the training device as a Data, whose batches are augmented there."""

from experiment.data.sets import Data, as_float, augment, load_data, selection
from experiment.data.sources import check_dataset
