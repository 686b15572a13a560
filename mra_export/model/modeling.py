"""MRA models on transformers' PreTrainedModel, with transformers' module names: checkpoints load in both directions.

What differs from transformers: attention runs on any device (mra::attention), batches may be ragged, lengths need not be multiples
of 32, and head_mask is applied. Shapes: B batch, N length in tokens, C hidden_size, H heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    ModelOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.pytorch_utils import apply_chunking_to_forward

from mra_export.errors import ContractError
from mra_export.model.attention import mra_attention
from mra_export.model.configuration import MraConfig
from mra_export.model.op import attention

FIRST_POSITION = 2
"""Position ids start here: MRA keeps RoBERTa's table, whose first two rows are never used."""


class MraEmbeddings(nn.Module):
    """Sum of word, position and token type embeddings, normalised."""

    position_ids: Tensor

    def __init__(self, config: MraConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings + FIRST_POSITION, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        # Part of a checkpoint, as in transformers.
        self.register_buffer("position_ids", torch.arange(config.max_position_embeddings).expand((1, -1)) + FIRST_POSITION)

    def forward(
        self, input_ids: Tensor | None, token_type_ids: Tensor | None, position_ids: Tensor | None, inputs_embeds: Tensor | None
    ) -> Tensor:
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = self.position_ids[:, : words.shape[1]]
        # Without token types every token is of type 0.
        types = self.token_type_embeddings.weight[0] if token_type_ids is None else self.token_type_embeddings(token_type_ids)
        return cast(Tensor, self.dropout(self.LayerNorm(words + types + self.position_embeddings(position_ids))))


class MraSelfAttention(nn.Module):
    """Query, key and value projections around the mra::attention operator."""

    def __init__(self, config: MraConfig) -> None:
        super().__init__()
        self.attributes = config.attributes()
        self.reference_attention = False
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, mask: Tensor, head_mask: Tensor | None) -> Tensor:
        """hidden_states: (B, N, C); mask: (B, N) int32, 1 = real; head_mask: (H,), a factor on each head's attention weights."""
        query, key, value = self.query(hidden_states), self.key(hidden_states), self.value(hidden_states)
        if self.reference_attention:
            context = mra_attention(query, key, value, mask, self.attributes)
        else:
            a = self.attributes
            context = attention(
                query,
                key,
                value,
                mask,
                a.num_heads,
                a.num_blocks,
                a.scale,
                a.approx_mode,
                a.initial_prior_first_n_blocks,
                a.initial_prior_diagonal_n_blocks,
                a.padding_invariant,
            )
        if head_mask is not None:
            head_size = context.shape[-1] // self.attributes.num_heads
            context = context * head_mask.to(context.dtype).repeat_interleave(head_size)
        return context


class MraSelfOutput(nn.Module):
    def __init__(self, config: MraConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, context: Tensor, hidden_states: Tensor) -> Tensor:
        return cast(Tensor, self.LayerNorm(self.dropout(self.dense(context)) + hidden_states))


class MraAttention(nn.Module):
    def __init__(self, config: MraConfig) -> None:
        super().__init__()
        self.self = MraSelfAttention(config)
        self.output = MraSelfOutput(config)

    def forward(self, hidden_states: Tensor, mask: Tensor, head_mask: Tensor | None) -> Tensor:
        return cast(Tensor, self.output(self.self(hidden_states, mask, head_mask), hidden_states))


class MraIntermediate(nn.Module):
    def __init__(self, config: MraConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return cast(Tensor, self.intermediate_act_fn(self.dense(hidden_states)))


class MraOutput(nn.Module):
    def __init__(self, config: MraConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, intermediate: Tensor, attention_output: Tensor) -> Tensor:
        return cast(Tensor, self.LayerNorm(self.dropout(self.dense(intermediate)) + attention_output))


class MraLayer(nn.Module):
    def __init__(self, config: MraConfig) -> None:
        super().__init__()
        self.chunk_size_feed_forward = config.chunk_size_feed_forward
        self.attention = MraAttention(config)
        self.intermediate = MraIntermediate(config)
        self.output = MraOutput(config)

    def forward(self, hidden_states: Tensor, mask: Tensor, head_mask: Tensor | None) -> Tensor:
        attended = self.attention(hidden_states, mask, head_mask)
        return cast(Tensor, apply_chunking_to_forward(self._feed_forward, self.chunk_size_feed_forward, 1, attended))

    def _feed_forward(self, attended: Tensor) -> Tensor:
        return cast(Tensor, self.output(self.intermediate(attended), attended))


class MraEncoder(nn.Module):
    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(self, config: MraConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList([MraLayer(config) for _ in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False  # transformers sets this and the function above

    def forward(self, hidden_states: Tensor, mask: Tensor, head_mask: Tensor | None) -> list[Tensor]:
        """The embeddings and each layer's output: num_hidden_layers + 1 tensors (B, N, C). head_mask: (layers, H)."""
        states = [hidden_states]
        for index, layer in enumerate(self.layer):
            arguments = (states[-1], mask, None if head_mask is None else head_mask[index])
            if self.gradient_checkpointing and self.training:
                states.append(self._gradient_checkpointing_func(layer.__call__, *arguments))
            else:
                states.append(layer(*arguments))
        return states


class MraPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What every MRA model shares: loading, saving, initial weights, and how attention runs."""

    config_class = MraConfig
    base_model_prefix = "mra"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MraLayer"]  # noqa: RUF012
    # Releases of transformers differ in which of these constants they save.
    _keys_to_ignore_on_load_missing = [r"embeddings\.position_ids$"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"embeddings\.(position|token_type)_ids$"]  # noqa: RUF012

    def __init__(self, config: MraConfig) -> None:
        config.check()
        super().__init__(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # nn.init by its module's name: transformers 5 patches it there, so that weights already loaded are left alone.
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            loaded = getattr(module.weight, "_is_hf_initialized", False)  # a flag that a slice of the weight does not carry
            if isinstance(module, nn.Embedding) and module.padding_idx is not None and not loaded:
                nn.init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, MraLMPredictionHead):
            nn.init.zeros_(module.bias)
        elif isinstance(module, MraEmbeddings):
            # A constant: transformers 5 builds models without storage, then asks for what the checkpoint did not hold.
            length = module.position_ids.shape[-1]
            module.position_ids.copy_(torch.arange(FIRST_POSITION, length + FIRST_POSITION)[None])

    def set_padding_invariant(self, padding_invariant: bool) -> None:
        """True: a sequence gives the same result alone and in any batch. False (the start): as in transformers, padding counts."""
        for module in self._self_attentions():
            module.attributes = dataclasses.replace(module.attributes, padding_invariant=padding_invariant)

    def set_reference_attention(self, reference: bool) -> None:
        """True: attention runs in plain torch even where the compiled library is there; backward keeps instead of recomputing."""
        for module in self._self_attentions():
            module.reference_attention = reference

    def _self_attentions(self) -> list[MraSelfAttention]:
        return [module for module in self.modules() if isinstance(module, MraSelfAttention)]

    def _wants_dict(self, return_dict: bool | None) -> bool:
        return bool(self.config.return_dict if return_dict is None else return_dict)


class MraModel(MraPreTrainedModel):
    """The encoder: tokens in, one vector per token out."""

    def __init__(self, config: MraConfig) -> None:
        super().__init__(config)
        self.embeddings = MraEmbeddings(config)
        self.encoder = MraEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> tuple[Any, ...] | BaseModelOutput:
        """Encode a batch.

        input_ids: (B, N) int64, or inputs_embeds: (B, N, C); exactly one of them. B >= 1, 1 <= N <= max_position_embeddings.
        attention_mask: (B, N), nonzero = real token; default all real.
        token_type_ids: (B, N) int64 below type_vocab_size; default 0.
        position_ids: (B, N) or (1, N) int64 from 2 to max_position_embeddings + 1; default 2, 3, ...
        head_mask: (H,) or (layers, H), a factor on each head's attention weights.
        output_attentions: refused when true: MRA never forms the attention matrix.

        Returns last_hidden_state (B, N, C) and, on request, hidden_states: the embeddings and each layer's output.
        Raises ContractError for anything else.
        """
        _refuse_attentions(output_attentions or getattr(self.config, "output_attentions", False))
        if (input_ids is None) == (inputs_embeds is None):
            count = "neither" if input_ids is None else "both"
            raise ContractError(f"{count} of input_ids and inputs_embeds given: pass one of them")
        tokens = cast(Tensor, input_ids if input_ids is not None else inputs_embeds)
        mask = self._checked_mask(tokens, attention_mask)
        for name, ids in (("token_type_ids", token_type_ids), ("position_ids", position_ids)):
            if ids is not None and (ids.dim() != 2 or ids.shape[1] != tokens.shape[1] or ids.shape[0] not in (1, tokens.shape[0])):
                raise ContractError(f"{name} has shape {tuple(ids.shape)}: pass {tuple(tokens.shape[:2])}, as the tokens have")
        embedded = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        states = self.encoder(embedded, mask, self._layer_head_mask(head_mask))

        hidden_states = None
        if self.config.output_hidden_states if output_hidden_states is None else output_hidden_states:
            hidden_states = tuple(states)
        output = BaseModelOutput(last_hidden_state=states[-1], hidden_states=hidden_states)
        return output if self._wants_dict(return_dict) else cast("tuple[Any, ...]", output.to_tuple())

    def _checked_mask(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(B, N) int32, 1 = real token."""
        shape = tuple(tokens.shape[:2])
        if tokens.dim() != 2 and not tokens.is_floating_point():
            raise ContractError(f"input_ids has shape {tuple(tokens.shape)}: pass (batch, length)")
        if tokens.is_floating_point() and (tokens.dim() != 3 or tokens.shape[2] != self.config.hidden_size):
            hidden = self.config.hidden_size
            raise ContractError(f"inputs_embeds has shape {tuple(tokens.shape)}: pass (batch, length, hidden_size = {hidden})")
        limit = self.config.max_position_embeddings
        if shape[1] > limit:
            raise ContractError(
                f"the input is {shape[1]} tokens long, max_position_embeddings {limit}: shorten it to {limit} tokens"
            )
        if attention_mask is None:
            return torch.ones(shape, dtype=torch.int32, device=tokens.device)
        if attention_mask.dim() != 2 or tuple(attention_mask.shape) != shape:
            given = tuple(attention_mask.shape)
            raise ContractError(
                f"attention_mask has shape {given}, the input {shape}: pass a mask of the same shape, 1 = real token"
            )
        return (attention_mask != 0).to(torch.int32)

    def _layer_head_mask(self, head_mask: Tensor | None) -> Tensor | None:
        """(layers, H)."""
        if head_mask is None:
            return None
        layers, heads = self.config.num_hidden_layers, self.config.num_attention_heads
        if tuple(head_mask.shape) not in ((heads,), (layers, heads)):
            raise ContractError(
                f"head_mask has shape {tuple(head_mask.shape)}: pass ({heads},) or ({layers}, {heads}), one factor a head"
            )
        return head_mask.expand(layers, heads)


class MraPredictionHeadTransform(nn.Module):
    def __init__(self, config: MraConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.transform_act_fn = ACT2FN[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return cast(Tensor, self.LayerNorm(self.transform_act_fn(self.dense(hidden_states))))


class MraLMPredictionHead(nn.Module):
    def __init__(self, config: MraConfig) -> None:
        super().__init__()
        self.transform = MraPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=True)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def _tie_weights(self) -> None:
        # transformers 4 calls this whenever it ties weights; 5 reads _tied_weights_keys alone.
        self.decoder.bias = self.bias

    def forward(self, hidden_states: Tensor) -> Tensor:
        return cast(Tensor, self.decoder(self.transform(hidden_states)))


class MraOnlyMLMHead(nn.Module):
    def __init__(self, config: MraConfig) -> None:
        super().__init__()
        self.predictions = MraLMPredictionHead(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return cast(Tensor, self.predictions(hidden_states))


class MraForMaskedLM(MraPreTrainedModel):
    """Fill in masked tokens."""

    _tied_weights_keys = {  # noqa: RUF012
        "cls.predictions.decoder.bias": "cls.predictions.bias",
        "cls.predictions.decoder.weight": "mra.embeddings.word_embeddings.weight",
    }

    def __init__(self, config: MraConfig) -> None:
        super().__init__(config)
        self.mra = MraModel(config)
        self.cls = MraOnlyMLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.cls.predictions.decoder = new_embeddings
        self.cls.predictions.bias = new_embeddings.bias

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> tuple[Any, ...] | MaskedLMOutput:
        """logits: (B, N, vocab_size). labels: (B, N) int64, -100 = not scored. Other arguments: MraModel.forward."""
        outputs = self.mra(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            True,
        )
        logits = self.cls(outputs.last_hidden_state)
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return _finish(MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states), self._wants_dict(return_dict))


class MraClassificationHead(nn.Module):
    def __init__(self, config: MraConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.activation = ACT2FN[config.hidden_act]
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, hidden_states: Tensor) -> Tensor:
        first = self.dropout(hidden_states[:, 0])  # <s>, the token that stands for the sequence
        return cast(Tensor, self.out_proj(self.dropout(self.activation(self.dense(first)))))


class MraForSequenceClassification(MraPreTrainedModel):
    """Classify, or regress on, whole sequences."""

    def __init__(self, config: MraConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.mra = MraModel(config)
        self.classifier = MraClassificationHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> tuple[Any, ...] | SequenceClassifierOutput:
        """logits: (B, num_labels). Other arguments: MraModel.forward.

        labels: (B,) int64 for config.problem_type single_label_classification; (B, num_labels) for multi_label_classification
        and regression; (B,) for regression on one value. A problem_type of None is read off num_labels and the labels' dtype.
        """
        outputs = self.mra(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            True,
        )
        logits = self.classifier(outputs.last_hidden_state)
        loss = None if labels is None else self._loss(logits, labels)
        return _finish(
            SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states), self._wants_dict(return_dict)
        )

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        problem = self.config.problem_type
        if problem is None:
            if self.num_labels == 1:
                problem = "regression"
            elif labels.dtype in (torch.int64, torch.int32):
                problem = "single_label_classification"
            else:
                problem = "multi_label_classification"
        if problem == "single_label_classification":
            return nn.functional.cross_entropy(logits, labels.view(-1).long())
        if labels.numel() != logits.numel():
            raise ContractError(f"labels have shape {tuple(labels.shape)}, logits {tuple(logits.shape)}: pass one label a logit")
        labels = labels.view_as(logits).to(logits.dtype)
        if problem == "regression":
            return nn.functional.mse_loss(logits, labels)
        if problem == "multi_label_classification":
            return nn.functional.binary_cross_entropy_with_logits(logits, labels)
        raise ContractError(
            f"config.problem_type is {problem!r}: use one of regression, single_label_classification, multi_label_classification"
        )


class MraForMultipleChoice(MraPreTrainedModel):
    """Pick one of several texts."""

    def __init__(self, config: MraConfig) -> None:
        super().__init__(config)
        self.mra = MraModel(config)
        self.pre_classifier = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> tuple[Any, ...] | MultipleChoiceModelOutput:
        """logits: (B, choices). Inputs are (B, choices, N), embeddings (B, choices, N, C); else as MraModel.forward.

        labels: (B,) int64, the right choice.
        """
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is not None and tokens.dim() != (3 if input_ids is not None else 4):
            name = "input_ids" if input_ids is not None else "inputs_embeds"
            raise ContractError(f"{name} has shape {tuple(tokens.shape)}: pass (batch, choices, length) tokens")

        def flat(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.flatten(0, 1)

        outputs = self.mra(
            flat(input_ids),
            flat(attention_mask),
            flat(token_type_ids),
            flat(position_ids),
            head_mask,
            flat(inputs_embeds),
            output_attentions,
            output_hidden_states,
            True,
        )
        pooled = nn.functional.relu(self.pre_classifier(outputs.last_hidden_state[:, 0]))
        logits = self.classifier(pooled).view(-1, cast(Tensor, tokens).shape[1])
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return _finish(
            MultipleChoiceModelOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states), self._wants_dict(return_dict)
        )


class MraForTokenClassification(MraPreTrainedModel):
    """Classify each token."""

    def __init__(self, config: MraConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.mra = MraModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> tuple[Any, ...] | TokenClassifierOutput:
        """logits: (B, N, num_labels). labels: (B, N) int64, not scored where -100 or masked. Other arguments: MraModel.forward."""
        outputs = self.mra(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            True,
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            if attention_mask is not None:
                labels = labels.masked_fill(attention_mask == 0, -100)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return _finish(
            TokenClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states), self._wants_dict(return_dict)
        )


class MraForQuestionAnswering(MraPreTrainedModel):
    """Find the start and end of an answer."""

    def __init__(self, config: MraConfig) -> None:
        super().__init__(config)
        self.mra = MraModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> tuple[Any, ...] | QuestionAnsweringModelOutput:
        """start_logits, end_logits: (B, N). start_positions, end_positions: (B,) int64, beyond the text = not scored.

        Other arguments: MraModel.forward.
        """
        outputs = self.mra(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            True,
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            outside = start_logits.shape[1]
            losses = [
                nn.functional.cross_entropy(logits, positions.view(-1).clamp(0, outside), ignore_index=outside)
                for logits, positions in ((start_logits, start_positions), (end_logits, end_positions))
            ]
            loss = (losses[0] + losses[1]) / 2
        return _finish(
            QuestionAnsweringModelOutput(
                loss=loss, start_logits=start_logits, end_logits=end_logits, hidden_states=outputs.hidden_states
            ),
            self._wants_dict(return_dict),
        )


def _refuse_attentions(output_attentions: bool | None) -> None:
    if output_attentions:
        raise ContractError("output_attentions is True: MRA never forms the attention matrix, pass False")


def _finish(output: ModelOutput, as_dict: bool) -> Any:
    return output if as_dict else output.to_tuple()
