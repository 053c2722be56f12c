"""Adversarial training whose attack runs beside the step (ConAdv), and the layers it needs."""
