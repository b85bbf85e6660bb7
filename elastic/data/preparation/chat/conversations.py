"""Rows of conversations become turns: OpenAI's `messages`, ShareGPT, Alpaca; what is damaged is named, not guessed.

What comes out is JSON in one form: `{"messages": [...], "tools": [...]}`, as chat templates take it, with the weight of
a turn (0: it does not count) where the row gives one.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

from elastic.data.preparation.rows import NoText

ChatKind = Literal["messages", "sharegpt", "alpaca"]
CHAT_KINDS: tuple[ChatKind, ...] = get_args(ChatKind)

_KEYS: Mapping[ChatKind, tuple[str, ...]] = {"messages": ("messages",), "sharegpt": ("conversations", "conversation")}
_ROLES: Mapping[str, str] = {
    **{role: role for role in ("system", "user", "assistant", "tool", "developer")},
    **{"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant", "model": "assistant"},
    **{"observation": "tool", "function": "tool", "tool_response": "tool"},
}
_KEPT = ("tool_call_id", "name", "reasoning_content", "weight")


class _DamageError(Exception):
    """Why a conversation is left out: of what kind, and where in it."""

    def __init__(self, kind: str, where: str = "") -> None:
        super().__init__(kind)
        self.kind, self.where = kind, where


def build_taker(kind: ChatKind, key: str | None) -> Callable[[object, str], str | NoText]:
    """Return what makes one text of a row, or says what is wrong with it.

    Args:
        key: where the turns are; None: where they usually are.
    """

    def take(row: object, where: str) -> str | NoText:
        try:
            if not isinstance(row, dict):
                raise _DamageError("are no objects")
            fields = cast(dict[str, Any], row)
            messages = _take_alpaca(fields) if kind == "alpaca" else _take_turns(fields, kind, key)
            _check_order(messages)
            content: dict[str, Any] = {"messages": messages}
            if tools := _take_tools(fields):
                content["tools"] = tools
            return json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        except _DamageError as damage:
            why = f"is of those that {damage.kind}" + (f" ({damage.where})" if damage.where else "")
            return NoText(where, why, has_key=True, kind=damage.kind)

    return take


def _take_turns(row: Mapping[str, Any], kind: ChatKind, key: str | None) -> list[dict[str, Any]]:
    keys = (key,) if key else _KEYS[kind]
    name = next((name for name in keys if name in row), None)
    if name is None:
        raise _DamageError(f"have no {keys[0]}", f"has {', '.join(map(str, row)) or 'nothing'}")
    turns = row[name]
    if isinstance(turns, str):
        turns = _load(turns, f"have {name} that are text and no JSON")
    if turns is None:
        raise _DamageError(f"have null for {name}")
    if not isinstance(turns, list):
        raise _DamageError(f"have {name} that are no list", f"has {type(turns).__name__}")
    if not turns:
        raise _DamageError("have no turns")
    role_key, content_key = ("from", "value") if kind == "sharegpt" else ("role", "content")
    messages = [
        _take_turn(turn, role_key, content_key, number)
        for number, turn in enumerate(cast(Sequence[object], turns), start=1)
    ]
    system = row.get("system")
    if kind == "sharegpt" and isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _check_text(system, "the system prompt")})
    return messages


def _take_turn(turn: object, role_key: str, content_key: str, number: int) -> dict[str, Any]:
    where = f"in turn {number}"
    if not isinstance(turn, dict):
        raise _DamageError("have a turn that is no object", f"{where}: {type(turn).__name__}")
    fields = cast(Mapping[str, Any], turn)
    if role_key not in fields:
        raise _DamageError(f"have a turn without {role_key}", where)
    said = fields[role_key]
    role = _ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise _DamageError("have a turn of an unknown role", f"{where}: {said!r}")
    calls = _take_calls(fields.get("tool_calls"), where)
    if calls and role != "assistant":
        raise _DamageError("have tool calls that are not the assistant's", where)
    content = fields.get(content_key)
    if content_key not in fields and not calls:
        raise _DamageError(f"have a turn without {content_key}", where)
    text = "" if content is None and calls else _take_content(content, where)
    if not text.strip() and not calls:
        raise _DamageError("have an empty turn", f"{where} ({role})")
    message: dict[str, Any] = {"role": role, "content": text}
    if calls:
        message["tool_calls"] = calls
    message |= {name: fields[name] for name in _KEPT if fields.get(name) is not None}
    if message.get("weight", 1) not in (0, 1):
        raise _DamageError("have a turn whose weight is neither 0 nor 1", f"{where}: {message['weight']!r}")
    thought = message.get("reasoning_content", "")
    if not isinstance(thought, str):
        raise _DamageError("have a turn whose content is no text", where)
    _check_text(thought, where)
    return message


def _take_content(content: object, where: str) -> str:
    if isinstance(content, list):  # parts, as of models that see pictures
        parts: list[str] = []
        for part in cast(Sequence[object], content):
            text = cast(Mapping[str, Any], part).get("text") if isinstance(part, dict) else part
            kind = cast(Mapping[str, Any], part).get("type", "text") if isinstance(part, dict) else "text"
            if kind != "text":
                raise _DamageError("have a turn with more than text", f"{where}: {kind}")
            if not isinstance(text, str):
                raise _DamageError("have a turn whose content is no text", where)
            parts.append(text)
        content = "".join(parts)
    if content is None:
        raise _DamageError("have a turn whose content is null", where)
    if not isinstance(content, str):
        raise _DamageError("have a turn whose content is no text", f"{where}: {type(content).__name__}")
    return _check_text(content, where)


def _check_text(text: str, where: str) -> str:
    if "\ufffd" in text or any("\ud800" <= char <= "\udfff" for char in text):
        raise _DamageError("were decoded wrongly", f"{where} has a replacement character or half of a pair")
    if any(char < " " and char not in "\t\n\r" for char in text):
        raise _DamageError("have control characters", where)
    return text


def _take_calls(calls: object, where: str) -> list[dict[str, Any]]:
    if calls is None or calls == []:
        return []
    if not isinstance(calls, list):
        raise _DamageError("have tool calls that are no list", where)
    taken: list[dict[str, Any]] = []
    for call in cast(Sequence[object], calls):
        fields = cast(Mapping[str, Any], call) if isinstance(call, dict) else {}
        function = fields.get("function", fields)
        if not isinstance(function, dict) or not isinstance(cast(Mapping[str, Any], function).get("name"), str):
            raise _DamageError("have a tool call without a function's name", where)
        function = dict(cast(Mapping[str, Any], function))
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):  # as OpenAI sends them; templates take what they mean
            arguments = _load(arguments or "{}", "have a tool call whose arguments are no JSON", where)
        if not isinstance(arguments, dict):
            raise _DamageError("have a tool call whose arguments are no object", where)
        rest = {name: fields[name] for name in ("id",) if isinstance(fields.get(name), str)}
        taken.append({**rest, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return taken


def _take_tools(row: Mapping[str, Any]) -> list[Any]:
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _load(tools or "[]", "have tools that are text and no JSON")
    if tools is None:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in cast(Sequence[object], tools)):
        raise _DamageError("have tools that are no list of objects")
    return cast(list[Any], tools)


def _take_alpaca(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    for name in ("instruction", "output"):
        if name not in row:
            raise _DamageError(f"have no {name}", f"has {', '.join(map(str, row)) or 'nothing'}")
        if not isinstance(row[name], str):
            raise _DamageError(f"have an {name} that is no text", f"has {type(row[name]).__name__}")
        if not row[name].strip():
            raise _DamageError(f"have an empty {name}")
    more, system, past = row.get("input"), row.get("system"), row.get("history")
    if not isinstance(more, str | None) or not isinstance(system, str | None):
        raise _DamageError("have an input or a system prompt that is no text")
    messages: list[dict[str, Any]] = []
    if system and system.strip():
        messages.append({"role": "system", "content": system})
    if past is not None and not isinstance(past, list):
        raise _DamageError("have a history that is no list of pairs")
    for pair in cast(Sequence[object], past or ()):
        if not isinstance(pair, list) or len(cast(list[Any], pair)) != 2:
            raise _DamageError("have a history that is no list of pairs")
        for role, text in zip(("user", "assistant"), cast(list[Any], pair), strict=True):
            if not isinstance(text, str) or not text.strip():
                raise _DamageError("have an empty turn", "in the history")
            messages.append({"role": role, "content": text})
    asked = f"{row['instruction']}\n\n{more}" if more and more.strip() else row["instruction"]
    messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
    for message in messages:
        _check_text(message["content"], f"the {message['role']}'s text")
    return messages


def _check_order(messages: Sequence[Mapping[str, Any]]) -> None:
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise _DamageError("have no turn of an assistant", f"has {', '.join(roles)}")
    if "user" not in roles[: roles.index("assistant")]:
        raise _DamageError("begin with the assistant")
    for number, role in enumerate(roles[1:], start=2):
        if role in ("system", "developer"):
            raise _DamageError("have a system prompt that is not the first turn", f"in turn {number}")
        before = messages[number - 2]
        if role == "tool" and before["role"] != "tool" and before["role"] != "assistant":
            raise _DamageError("have a tool's answer without a call", f"in turn {number}")
    if not any(message["role"] == "assistant" and message.get("weight", 1) for message in messages):
        raise _DamageError("have no turn of an assistant that counts")


def _load(text: str, kind: str, where: str = "") -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise _DamageError(kind, where) from None
