"""The shipped configurations, as data: models, train, finetune and tune; `CONFIGS` is their folder."""

from pathlib import Path

CONFIGS: Path = Path(__file__).resolve().parent
