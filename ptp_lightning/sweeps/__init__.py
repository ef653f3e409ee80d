"""Ablation studies: one YAML a study, many trainings, one table. `ptp_lightning sweep` runs and reports them."""
