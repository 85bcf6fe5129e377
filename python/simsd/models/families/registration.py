"""Makes a family's classes known to transformers' Auto classes."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def register(model: type[PreTrainedModel]) -> None:
    """`model` has a stock class of transformers as its last base, whose checkpoints have the same layout."""
    config, stock = model.config_class, model.__bases__[-1].config_class
    # Checkpoints keep one matrix per expert, transformers' modules one tensor for all.
    if (conversion := get_checkpoint_conversion_mapping(stock.model_type)) is not None:
        register_checkpoint_conversion_mapping(config.model_type, conversion, overwrite=True)
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
    # transformers' text-generation pipeline and server look here for the names of models that they know.
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type] = model.__name__
