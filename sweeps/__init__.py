"""Ablation studies: one YAML a study, many trainings, one table. `python -m sweeps` runs and reports them."""
