"""Files of a predictor: checkpoints, adapter folders, whole-model folders and their model cards."""
