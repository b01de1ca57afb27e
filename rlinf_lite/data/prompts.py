"""From a question to the text that the model sees: template, examples, system prompt, chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rlinf_lite.config import DataConfig
from rlinf_lite.data.errors import DataError
from rlinf_lite.data.questions import Messages, Question, encodable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACE = "{prompt}"
"""Where in ``data.prompt_template`` the question goes."""


def prompt_writer(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Callable[[Question], str]:
    """The function from `Question` to prompt that ``config`` asks for.

    Raises:
        DataError: a chat template is asked for and the tokenizer has none. The function itself raises it for a question
            that cannot be put so.
    """
    if config.apply_chat_template and tokenizer.chat_template is None:
        name = tokenizer.name_or_path
        raise DataError(
            f"data.apply_chat_template=true: the tokenizer {name!r} has no chat template; set it to false, or set "
            "actor.tokenizer.tokenizer_model to a chat model's tokenizer"
        )

    def write(question: Question) -> str:
        text = _templated(question, config, tokenizer) if config.apply_chat_template else _plain(question, config)
        return encodable(text, question.where)

    return write


def _in_template(text: str, config: DataConfig) -> str:
    return config.prompt_template.replace(PLACE, text)


def _examples(config: DataConfig) -> Iterator[tuple[str, str]]:
    """Question, in the template, and answer; YAML reads an answer such as 43 as a number."""
    for shot in config.few_shot:
        yield _in_template(str(shot["question"]), config), str(shot["answer"])


def _plain(question: Question, config: DataConfig) -> str:
    if not isinstance(question.content, str):
        raise DataError(f"{question.where}: the prompt is a list of chat messages; set data.apply_chat_template=true")
    parts = [] if config.system_prompt is None else [config.system_prompt]
    # A blank before each answer, unless the template ends in one.
    parts += [
        f"{asked}{answer}" if asked[-1:].isspace() else f"{asked} {answer}" for asked, answer in _examples(config)
    ]
    return "\n\n".join([*parts, _in_template(question.content, config)])


def _templated(question: Question, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    from jinja2 import TemplateError

    messages = _conversation(question, config)
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **config.chat_template_kwargs
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"{question.where}: the tokenizer's chat template refuses this prompt ({error})") from None
    assert isinstance(text, str)
    return text


def _conversation(question: Question, config: DataConfig) -> Messages:
    """System prompt, examples as turns of their own, then the question; its last message goes into the template."""
    content = question.content
    asked = [{"role": "user", "content": content}] if isinstance(content, str) else content
    own_system = asked[:1] if asked[0]["role"] == "system" else []
    if own_system and config.system_prompt is not None:
        raise DataError(f"{question.where}: the prompt has a system message of its own; set data.system_prompt=null")
    system = own_system if config.system_prompt is None else [{"role": "system", "content": config.system_prompt}]
    shots = [
        {"role": role, "content": content}
        for example in _examples(config)
        for role, content in zip(("user", "assistant"), example, strict=True)
    ]
    *before, last = asked[len(own_system) :] or own_system
    return [*system, *shots, *before, {**last, "content": _in_template(last["content"], config)}]
