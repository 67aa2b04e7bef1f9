"""Reading a ``config.json`` strictly: a key that nothing read and nothing excuses is an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxtx.errors import MlxtxError

_MISSING = object()

# Keys that don't change what a decoder computes, as those don't that begin with an underscore.
HARMLESS = """
    architectures attention_dropout attn_implementation attn_pdrop auto_map bad_words_ids
    bos_token_id cache_implementation chunk_size_feed_forward classifier_dropout diversity_penalty
    do_sample dtype early_stopping embd_pdrop embedding_dropout encoder_no_repeat_ngram_size
    eos_token_id finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing
    hidden_dropout hidden_dropout_prob id2label initializer_range is_decoder is_llama_config
    label2id length_penalty max_length max_new_tokens max_sequence_length min_length
    model_max_length model_type neftune_noise_alpha no_repeat_ngram_size num_beam_groups num_beams
    num_labels num_return_sequences output_attentions output_hidden_states output_router_logits
    output_scores pad_token_id prefix pretraining_tp problem_type quantization quantization_config
    remove_invalid_values repetition_penalty resid_pdrop return_dict return_dict_in_generate
    router_aux_loss_coef router_jitter_noise sep_token_id task_specific_params temperature
    tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
    """
# Keys that are harmless where they switch something off, or list nothing (null always is).
OFF = """
    add_cross_attention attention_bias cross_attention_hidden_size is_encoder_decoder mlp_bias
    num_nextn_predict_layers pruned_heads qk_layernorm qkv_bias rope_interleaved rope_scaling
    shared_expert_intermediate_size sliding_window tie_encoder_decoder use_bidirectional_attention
    use_mrope use_qk_norm use_sliding_window
    """


class ConfigReader:
    """Hands out the values of a config and remembers which keys were asked for."""

    def __init__(self, config: Mapping[str, Any], owner: str | None = None):
        self.config = dict(config)
        self.owner = owner or str(config.get("model_type"))
        self._read = {*HARMLESS.split(), *(name for name in config if name.startswith("_"))}

    def get(self, *names: str, default: Any = _MISSING) -> Any:
        """The first of ``names`` that is there and not null; all of them count as read."""
        self._read.update(names)
        for name in names:
            value = self.config.get(name)
            if value in ("true", "false", "True", "False"):  # texts, which all count as true
                raise MlxtxError(f"config.json: {name}={value!r} is a text: take away its quotes")
            if value is not None:
                return value
        if default is _MISSING:
            raise MlxtxError(f"config.json lacks {names[0]!r}, which {self.owner} needs")
        return default

    def nullable(self, name: str, default: Any) -> Any:
        """The value of a key that may say null on purpose; ``default`` only where it is absent."""
        self._read.add(name)
        return self.config.get(name, default)

    def inner(self, name: str) -> ConfigReader:
        """A reader of the dictionary under ``name`` (empty when absent); finish it as well."""
        return ConfigReader(self.get(name, default={}), f"{self.owner}'s {name}")

    def ignore(self, names: str) -> None:
        """Keys, separated by spaces, that this family knows to change nothing here."""
        self._read.update(names.split())

    def expect(self, **values: Any) -> None:
        """Keys that are understood at one value only, or at each of a tuple of values; an absent
        key means the first."""
        for name, known in values.items():
            known = known if isinstance(known, tuple) else (known,)
            self._read.add(name)
            value = self.config.get(name, known[0])
            if value not in known:
                raise MlxtxError(
                    f"config.json: {name}={value!r:.60} is not supported for {self.owner}"
                    f" (known: {', '.join(map(repr, known))})"
                )

    def finish(self) -> None:
        """An error that names every key nobody read."""
        left = [
            f"{name:.60}={value!r:.60}"
            for name, value in self.config.items()
            if name not in self._read and value is not None and (value or name not in OFF.split())
        ]
        if left:
            raise MlxtxError(
                f"config.json has keys that {self.owner} does not know, so its results could be"
                f" wrong (take out what changes nothing): {', '.join(sorted(left))}"
            )
