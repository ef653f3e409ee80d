"""Ablation studies: a YAML file describes a study, `sweep run` trains its points, `sweep report` compares them."""
