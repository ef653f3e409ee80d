"""Files of a predictor: checkpoints, adapter folders, folders with the base model, model cards, and migrations."""
