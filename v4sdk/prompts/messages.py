"""From chat messages to turns: what is accepted, and the two ways to put a conversation in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from v4sdk.errors import PromptError
from v4sdk.prompts.tools import check_calls, check_tools

ROLES = ("system", "user", "assistant", "tool", "latest_reminder", "developer")


@dataclass
class Turn:
    """One message, checked.

    Args:
        blocks: of user turns: (tool call id or None for text, text).
        tools: inner function objects declared on this message.
        continues: an assistant turn that the completion goes on with, so no EOS follows.
        open_thought: an assistant turn whose reasoning the completion goes on with.
    """

    role: str
    text: str = ""
    blocks: list[tuple[str | None, str]] = field(default_factory=list)
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    tools: list[Mapping[str, Any]] = field(default_factory=list)
    response_format: Any = None
    task: str | None = None
    continues: bool = False
    open_thought: bool = False


def read_messages(messages: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """Check every message and return one turn each; `tool` results keep their own turn.

    Raises:
        PromptError: on an empty list, an unknown role, missing or mistyped content, orphaned tool results.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise PromptError(
            f"`messages` is {type(messages).__name__}, expected a list",
            hint='messages=[{"role": "user", "content": "..."}]',
        )
    if not messages:
        raise PromptError("`messages` is empty, expected at least one message")
    turns = [_read(message, f"messages[{index}]") for index, message in enumerate(messages)]
    for index, message in enumerate(messages[:-1]):
        if message.get("prefix"):
            raise PromptError(f"`messages[{index}].prefix` is set, expected on the last message only")
    return turns


def _read(message: object, where: str) -> Turn:
    if not isinstance(message, Mapping):
        raise PromptError(f"`{where}` is {type(message).__name__}, expected an object")
    role = message.get("role")
    if role not in ROLES:
        raise PromptError(f"`{where}.role` is {role!r}, expected one of {', '.join(f'`{r}`' for r in ROLES)}")
    content = message.get("content")
    # an assistant turn may consist of reasoning or calls alone
    if content is None and role != "assistant":
        raise PromptError(f"`{where}.content` is missing, expected text for role `{role}`")
    text = _content(content, where)
    if role == "developer" and not text:
        raise PromptError(f"`{where}.content` is empty, expected text for role `developer`")
    turn = Turn(role, text, task=message.get("task"), response_format=message.get("response_format"))
    turn.tools = check_tools(message.get("tools"), f"{where}.tools")
    if role == "assistant":
        reasoning = message.get("reasoning_content", message.get("reasoning"))
        if not isinstance(reasoning, str | None):
            raise PromptError(f"`{where}.reasoning_content` is {type(reasoning).__name__}, expected a string")
        turn.reasoning = reasoning or ""
        turn.calls = check_calls(message.get("tool_calls"), where)
        turn.continues = bool(message.get("prefix") or message.get("wo_eos"))
        turn.open_thought = bool(message.get("prefix")) and not turn.text and not turn.calls
    if role in ("user", "tool"):
        call_id = message.get("tool_call_id") if role == "tool" else None
        turn.blocks = [(str(call_id or "") if role == "tool" else None, text)]
        turn.text = ""
    return turn


def _content(content: object, where: str) -> str:
    """Return the text of a message: a string, or parts joined by a blank line."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise PromptError(
            f"`{where}.content` is {type(content).__name__}, expected a string or a list of parts"
        )
    texts: list[str] = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image_url", "image"):
            # V4 sees no images; refusing would lock a conversation whose client resends its history
            texts.append("[Unsupported Image]")
        else:
            raise PromptError(f"`{where}.content[{index}]` has type {kind!r}, expected `text`")
    return "\n\n".join(texts)


def reference_order(turns: Sequence[Turn]) -> list[Turn]:
    """Merge tool results and consecutive user messages into user turns, as the shipped encoder does."""
    merged: list[Turn] = []
    for turn in turns:
        last = merged[-1] if merged else None
        if turn.role == "tool":
            if last is not None and last.role == "user":
                last.blocks += turn.blocks
            else:
                merged.append(Turn("user", blocks=list(turn.blocks)))
        elif turn.role == "user" and last is not None and last.role == "user" and last.task is None:
            last.blocks += turn.blocks
        else:
            merged.append(replace(turn, blocks=list(turn.blocks)))
    _sort_results(merged)
    return merged


def hosted_order(turns: Sequence[Turn], *, hoist: bool) -> list[Turn]:
    """As `reference_order`, without empty system messages.

    With `hoist` the other system messages are joined at the front, and empty ones among consecutive user
    messages are left out.
    """
    systems = [turn for turn in turns if turn.role == "system" and (turn.text or turn.tools)]
    rest = [turn for turn in turns if turn.role != "system" or (not hoist and (turn.text or turn.tools))]
    if systems and hoist:
        tools = [function for turn in systems for function in turn.tools]
        text = "\n\n".join(turn.text for turn in systems if turn.text)
        rest.insert(0, replace(systems[0], text=text, tools=tools))
    rest = _joined_users(rest) if hoist else rest
    return reference_order(rest or [Turn("system")])


def _joined_users(turns: Sequence[Turn]) -> list[Turn]:
    joined: list[Turn] = []
    for turn in turns:
        if turn.role == "user" and joined and joined[-1].role == "user":
            texts = [text for _, text in (*joined[-1].blocks, *turn.blocks) if text]
            joined[-1] = replace(turn, blocks=[(None, "\n\n".join(texts))])
        else:
            joined.append(turn)
    return joined


def check_results(turns: Sequence[Turn]) -> None:
    """Check that tool results and tool calls belong together, as the hosted API does.

    Raises:
        PromptError: if a result answers no call of the preceding assistant message, or a call has no result.
    """
    waiting: list[str] = []
    open_calls: set[str] = set()
    for index, turn in enumerate(turns):
        if turn.role == "tool":
            call_id = turn.blocks[0][0] or ""
            if call_id not in waiting:
                raise PromptError(
                    f"`messages[{index}]` answers tool call `{call_id}`, which the turn before did not make"
                )
            open_calls.discard(call_id)
            continue
        if open_calls:
            raise PromptError(f"tool calls {sorted(open_calls)} have no result before `messages[{index}]`")
        waiting = [call["id"] for call in turn.calls]
        open_calls = set(waiting)
    if open_calls and not turns[-1].continues:
        raise PromptError(f"tool calls {sorted(open_calls)} have no result at the end of `messages`")


def _sort_results(turns: Sequence[Turn]) -> None:
    """Put the tool results of a user turn into the order of their calls; texts keep their places."""
    order: dict[str, int] = {}
    for turn in turns:
        if turn.calls:
            order = {call["id"]: index for index, call in enumerate(turn.calls) if call["id"]}
        elif turn.role == "user" and order:
            results = sorted(
                (block for block in turn.blocks if block[0] is not None),
                key=lambda block: order.get(block[0] or "", 0),
            )
            ordered = iter(results)
            turn.blocks = [block if block[0] is None else next(ordered) for block in turn.blocks]
