"""From questions to the texts that the model sees: template, examples, system prompt, chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

from rlinf_lite.config import DataConfig
from rlinf_lite.data.errors import DataError
from rlinf_lite.data.messages import ROLES, Messages
from rlinf_lite.data.questions import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACE = "{prompt}"
"""Where in ``data.prompt_template`` the question goes."""
_SYSTEM_ROLES = ("system", "developer")

Writer = Callable[[Sequence[Question]], list[str]]


def prompt_writer(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Writer:
    """The function from questions to prompts that ``config`` asks for.

    Raises:
        DataError: a chat template is asked for and the tokenizer has none. The function itself raises it for a question
            that cannot be put so.
    """
    if not config.apply_chat_template:
        return _plain_writer(config)
    if tokenizer.chat_template is None:
        name = tokenizer.name_or_path
        raise DataError(
            f"data.apply_chat_template=true: the tokenizer {name!r} has no chat template; set it to false, or set "
            "actor.tokenizer.tokenizer_model to a chat model's tokenizer"
        )
    return _chat_writer(config, tokenizer)


def _in_template(text: str, config: DataConfig) -> str:
    return config.prompt_template.replace(PLACE, text)


def _examples(config: DataConfig) -> Iterator[tuple[str, str]]:
    """Question, in the template, and answer; YAML reads an answer such as 43 as a number."""
    for shot in config.few_shot:
        yield _in_template(str(shot["question"]), config), str(shot["answer"])


def _plain_writer(config: DataConfig) -> Writer:
    parts = [] if config.system_prompt is None else [config.system_prompt]
    # A blank before each answer, unless the template ends in one.
    parts += [
        f"{asked}{answer}" if asked[-1:].isspace() else f"{asked} {answer}" for asked, answer in _examples(config)
    ]
    before = "".join(f"{part}\n\n" for part in parts)

    def write(questions: Sequence[Question]) -> list[str]:
        for question in questions:
            if not isinstance(question.content, str):
                raise DataError(
                    f"{question.where}: the prompt is a list of chat messages; set data.apply_chat_template=true"
                )
        return [before + _in_template(str(question.content), config) for question in questions]

    return write


def _chat_writer(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Writer:
    from jinja2 import TemplateError

    def render(chats: list[Messages], *, goes_on: bool) -> list[str]:
        texts = tokenizer.apply_chat_template(
            chats,
            tokenize=False,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
            **config.chat_template_kwargs,
        )
        assert isinstance(texts, list)
        return cast(list[str], texts)

    def render_by_row(chats: Sequence[Messages], questions: Sequence[Question], *, goes_on: bool) -> list[str]:
        texts = []
        for chat, question in zip(chats, questions, strict=True):
            try:
                texts += render([chat], goes_on=goes_on)
            except (TemplateError, TypeError, ValueError) as error:
                reason = str(error).partition("\n")[0]
                hint = "; it ends with a message of the assistant, which is to be continued" if goes_on else ""
                raise DataError(
                    f"{question.where}: the tokenizer's chat template refuses this prompt ({reason}){hint}"
                ) from None
        return texts

    def write(questions: Sequence[Question]) -> list[str]:
        chats = [_conversation(question, config) for question in questions]
        for chat, question in zip(chats, questions, strict=True):
            _refuse_unknown_roles(chat, question, str(tokenizer.chat_template))
        written: dict[int, str] = {}
        for goes_on in (False, True):
            rows = [row for row, chat in enumerate(chats) if (chat[-1]["role"] == "assistant") is goes_on]
            if not rows:
                continue
            chosen = [chats[row] for row in rows]
            try:
                texts = render(chosen, goes_on=goes_on)
            except (TemplateError, TypeError, ValueError):
                texts = render_by_row(chosen, [questions[row] for row in rows], goes_on=goes_on)  # names the row
            written.update(zip(rows, texts, strict=True))
        return [written[row] for row in range(len(questions))]

    return write


def _refuse_unknown_roles(chat: Messages, question: Question, template: str) -> None:
    """Templates often pass over a role that they do not know, and with it the message."""
    for message in chat:
        role = message["role"]
        if role not in ROLES and role not in template:
            raise DataError(
                f"{question.where}: a message has the role {role!r}, which the tokenizer's chat template does not "
                f"name; the roles are {', '.join(ROLES)}"
            )


def _conversation(question: Question, config: DataConfig) -> Messages:
    """System prompt, examples as turns of their own, then the question; ``data.prompt_template`` goes around the last
    message of the user. A last message of the assistant is what the response begins with, and stays as it is.
    """
    content = question.content
    asked = [{"role": "user", "content": content}] if isinstance(content, str) else content
    roles = [message["role"] for message in asked]
    if config.system_prompt is not None and any(role in _SYSTEM_ROLES for role in roles):
        raise DataError(f"{question.where}: the prompt has a system message of its own; set data.system_prompt=null")
    num_before = 1 if roles[0] in _SYSTEM_ROLES and len(roles) > 1 else 0
    system = asked[:num_before] if config.system_prompt is None else _turns(("system", config.system_prompt))
    shots = [turn for asks, answers in _examples(config) for turn in _turns(("user", asks), ("assistant", answers))]
    if shots and "user" not in roles:
        raise DataError(
            f"{question.where}: the prompt has no message of the user, before which examples could come; add one, or "
            "remove data.few_shot"
        )
    place = _question_in(roles)
    if place is not None:
        asked = [*asked]
        asked[place] = {**asked[place], "content": _in_template(asked[place]["content"], config)}
    elif config.prompt_template != PLACE:
        raise DataError(
            f"{question.where}: the prompt has only messages of the assistant, and none for data.prompt_template; "
            "add a message of the user"
        )
    return [*system, *shots, *asked[num_before:]]


def _question_in(roles: Sequence[str]) -> int | None:
    """Which message asks: the user's last one, else the last that is not the assistant's; None: there is none."""
    for of in (["user"], {*roles} - {"assistant"}):
        if found := [index for index, role in enumerate(roles) if role in of]:
            return found[-1]
    return None


def _turns(*turns: tuple[str, str]) -> Messages:
    return [{"role": role, "content": content} for role, content in turns]
