"""Renders questions into prompts: prompt template, few-shot examples, system prompt, chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

from rlinf_lite.config import DataConfig
from rlinf_lite.data.errors import DataError
from rlinf_lite.data.messages import ROLES, Messages
from rlinf_lite.data.questions import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACEHOLDER = "{prompt}"
"""Replaced by the question in ``data.prompt_template``."""
_SYSTEM_ROLES = ("system", "developer")

Renderer = Callable[[Sequence[Question]], list[str]]


def prompt_renderer(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Renderer:
    """Make the function that renders questions into prompts as ``config`` says.

    Raises:
        DataError: a chat template is asked for and the tokenizer has none. The function itself raises it for a question
            that cannot be rendered.
    """
    if not config.apply_chat_template:
        return _plain_renderer(config)
    if tokenizer.chat_template is None:
        name = tokenizer.name_or_path
        raise DataError(
            f"data.apply_chat_template=true: the tokenizer {name!r} has no chat template; set it to false, or set "
            "actor.tokenizer.tokenizer_model to a chat model's tokenizer"
        )
    return _ChatRenderer(config, tokenizer)


def _in_template(text: str, config: DataConfig) -> str:
    return config.prompt_template.replace(PLACEHOLDER, text)


def _examples(config: DataConfig) -> Iterator[tuple[str, str]]:
    """Each few-shot question, in the template, with its answer."""
    for shot in config.few_shot:
        # YAML reads an answer such as 43 as a number.
        yield _in_template(str(shot["question"]), config), str(shot["answer"])


def _plain_renderer(config: DataConfig) -> Renderer:
    parts = [] if config.system_prompt is None else [config.system_prompt]
    for question, answer in _examples(config):
        # A space before the answer, unless the template ends in white space.
        parts.append(f"{question}{answer}" if question[-1:].isspace() else f"{question} {answer}")
    before = "".join(f"{part}\n\n" for part in parts)

    def render(questions: Sequence[Question]) -> list[str]:
        for question in questions:
            if not isinstance(question.content, str):
                raise DataError(
                    f"{question.where}: the prompt is a list of chat messages; set data.apply_chat_template=true"
                )
        return [before + _in_template(str(question.content), config) for question in questions]

    return render


class _ChatRenderer:
    """Renders questions with the tokenizer's chat template."""

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config, self._tokenizer = config, tokenizer

    def __call__(self, questions: Sequence[Question]) -> list[str]:
        chats = [_conversation(question, self._config) for question in questions]
        for chat, question in zip(chats, questions, strict=True):
            _refuse_unknown_roles(chat, question, str(self._tokenizer.chat_template))
        prompts: dict[int, str] = {}
        for continued in (False, True):
            rows = [row for row, chat in enumerate(chats) if (chat[-1]["role"] == "assistant") is continued]
            if rows:
                texts = self._render([chats[row] for row in rows], [questions[row] for row in rows], continued)
                prompts.update(zip(rows, texts, strict=True))
        return [prompts[row] for row in range(len(questions))]

    def _render(self, chats: list[Messages], questions: Sequence[Question], continued: bool) -> list[str]:
        """Render all chats in one call, or row by row where that fails, to name the row that is wrong.

        Args:
            continued: the last message is the assistant's, and the model continues it.
        """
        from jinja2 import TemplateError

        try:
            return self._apply(chats, continued)
        except (TemplateError, TypeError, ValueError) as error:
            if len(chats) > 1:
                pairs = zip(chats, questions, strict=True)
                return [text for chat, question in pairs for text in self._render([chat], [question], continued)]
            reason = str(error).partition("\n")[0]
            hint = "; it ends with a message of the assistant, which is to be continued" if continued else ""
            raise DataError(
                f"{questions[0].where}: the tokenizer's chat template refuses this prompt ({reason}){hint}"
            ) from None

    def _apply(self, chats: list[Messages], continued: bool) -> list[str]:
        texts = self._tokenizer.apply_chat_template(
            chats,
            tokenize=False,
            add_generation_prompt=not continued,
            continue_final_message=continued,
            **self._config.chat_template_kwargs,
        )
        assert isinstance(texts, list)
        return cast(list[str], texts)


def _refuse_unknown_roles(chat: Messages, question: Question, template: str) -> None:
    """Refuse roles that the template does not name, because many templates drop such messages silently."""
    for message in chat:
        role = message["role"]
        if role not in ROLES and role not in template:
            raise DataError(
                f"{question.where}: a message has the role {role!r}, which the tokenizer's chat template does not "
                f"name; the roles are {', '.join(ROLES)}"
            )


def _conversation(question: Question, config: DataConfig) -> Messages:
    """The messages of a prompt: system prompt, few-shot examples as turns, then the question.

    ``data.prompt_template`` is applied to the last message of the user. If the last message is the assistant's, it is
    the beginning of the response and stays as it is.
    """
    content = question.content
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else list(content)
    roles = [message["role"] for message in messages]
    if config.system_prompt is not None and any(role in _SYSTEM_ROLES for role in roles):
        raise DataError(f"{question.where}: the prompt has a system message of its own; set data.system_prompt=null")
    num_system = 1 if roles[0] in _SYSTEM_ROLES and len(roles) > 1 else 0
    system = messages[:num_system] if config.system_prompt is None else _turns(("system", config.system_prompt))
    shots = [turn for asked, answer in _examples(config) for turn in _turns(("user", asked), ("assistant", answer))]
    if shots and "user" not in roles:
        raise DataError(
            f"{question.where}: the prompt has no message of the user, so data.few_shot has no place in it; add one, "
            "or remove data.few_shot"
        )
    asking = _asking_message(roles)
    if asking is not None:
        messages[asking] = {**messages[asking], "content": _in_template(messages[asking]["content"], config)}
    elif config.prompt_template != PLACEHOLDER:
        raise DataError(
            f"{question.where}: the prompt has only messages of the assistant, so data.prompt_template has no place in "
            "it; add a message of the user"
        )
    return [*system, *shots, *messages[num_system:]]


def _asking_message(roles: Sequence[str]) -> int | None:
    """Index of the message that asks: the last one of the user, or else the last one that is not the assistant's.

    None if all are the assistant's.
    """
    if "user" in roles:
        return max(index for index, role in enumerate(roles) if role == "user")
    return max((index for index, role in enumerate(roles) if role != "assistant"), default=None)


def _turns(*turns: tuple[str, str]) -> Messages:
    return [{"role": role, "content": content} for role, content in turns]
