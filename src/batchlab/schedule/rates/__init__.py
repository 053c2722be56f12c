"""Learning rates and weight decays as functions of examples or tokens seen."""
