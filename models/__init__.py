"""The zoo: `create_model`, `list_models`, `is_model`, `register_model`, `register_with_timm`."""

from models.factory import create_model
from models.registry import is_model, list_models, register_model
from models.timm_registry import register_with_timm

__all__ = ["create_model", "is_model", "list_models", "register_model", "register_with_timm"]
