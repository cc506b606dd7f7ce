"""The drop-path rate of a run whose config names none: the one that the model's authors published for such a run."""

from models.config import ModelFacts
from training.config import DropPathSection, ModelSection


def with_default_rate(section: DropPathSection, model: ModelSection, facts: ModelFacts) -> tuple[DropPathSection, str]:
    """The section with a rate in it; unchanged where one was given, or a list that says all rates.

    A run that starts from weights is a fine-tuning, for which a higher rate may be published than for training from
    scratch. A model about which nothing is published gets 0.

    Args:
        section: The config's.
        model: Which says whether the run starts from weights.
        facts: Of that model.

    Returns:
        The section, and where its rate comes from in words; nothing where it was given.
    """
    if section.rate is not None or isinstance(section.profile, list):
        return section, ""
    starts_from_weights = model.pretrained or model.checkpoint is not None
    if starts_from_weights and facts.finetune_rate is not None:
        rate, why = facts.finetune_rate, "published for fine-tuning it, and this run starts from weights"
    elif facts.drop_path_rate is not None:
        rate, why = facts.drop_path_rate, "published for training it"
        if starts_from_weights:
            why += "; for fine-tuning it none is known"
    else:
        rate, why = 0.0, "none is published for this model"
    return section.model_copy(update={"rate": rate}), f"{rate:g} by default: {why}; drop_path.rate says another"
