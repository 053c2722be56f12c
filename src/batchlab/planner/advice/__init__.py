"""What the published rules say of a run, side by side."""

from batchlab.planner.advice.advise import advise
from batchlab.planner.advice.nouns import Advice, Answer, NotAsked, Setting, Verdict

__all__ = ["Advice", "Answer", "NotAsked", "Setting", "Verdict", "advise"]
