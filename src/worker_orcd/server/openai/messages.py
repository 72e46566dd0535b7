"""Messages and tools of a chat, checked and put into the form that chat templates read."""

from __future__ import annotations

import re
from typing import Any

from worker_orcd.server.openai.bodies import refuse
from worker_orcd.server.output import decoded

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_TEXT_PARTS = dict.fromkeys(("text", "input_text", "output_text", "reasoning_text"), "text") | {"refusal": "refusal"}


def template_messages(messages: list[dict[str, Any]], has_developer: bool) -> list[dict[str, Any]]:
    """The conversation for a template; one that knows no developer reads those messages as the system's."""
    return [_message(message, f"messages[{i}]", has_developer) for i, message in enumerate(messages)]


def _message(message: dict[str, Any], param: str, has_developer: bool) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        refuse(f"{param}.role", "value", f"must be one of {', '.join(sorted(ROLES))}")
    calls = message.get("tool_calls") or []
    refuses = role == "assistant" and message.get("content") is None and message.get("refusal") is not None
    said = "refusal" if refuses else "content"
    content = message.get(said)
    if content is None and (
        role != "assistant" or not (calls or message.get("reasoning_content") or message.get("reasoning"))
    ):
        refuse(f"{param}.content", "required", "is missing")
    made: dict[str, Any] = {"role": "system" if role == "developer" and not has_developer else role}
    made["content"] = text_of(content, f"{param}.{said}")
    for name in ("name", "tool_call_id", "reasoning_content", "reasoning"):
        if (value := message.get(name)) is not None:
            if not isinstance(value, str):
                refuse(f"{param}.{name}", "type", "must be a string")
            made[name] = value
    if calls:
        if role != "assistant" or not isinstance(calls, list):
            refuse(f"{param}.tool_calls", "type", "must be a list, in a message of the assistant")
        made["tool_calls"] = [_call(call, f"{param}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return made


def text_of(content: Any, param: str) -> str:
    """The text of a message: a string, or parts that are text, joined by line ends."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        refuse(param, "type", "must be a string or a list of parts")
    return "\n".join(text_of_part(part, f"{param}[{i}]") for i, part in enumerate(content))


def text_of_part(part: Any, param: str) -> str:
    """The text of a part that is text."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        refuse(param, "type", "must be an object with a type")
    if kind not in _TEXT_PARTS:
        refuse(param, "unsupported", "is not text; this model reads text only")
    text = part.get(_TEXT_PARTS[kind])
    if not isinstance(text, str):
        refuse(f"{param}.{_TEXT_PARTS[kind]}", "type", "must be a string")
    return text


def _call(call: Any, param: str) -> dict[str, Any]:
    """A call of the past. Templates want its arguments as an object, where they are one."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        refuse(f"{param}.function.name", "type", "must be a string")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        parsed = decoded(arguments)
        arguments = parsed if isinstance(parsed, dict) else arguments
    elif not isinstance(arguments, dict):
        refuse(f"{param}.function.arguments", "type", "must be a string of JSON")
    made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return made | ({"id": call["id"]} if isinstance(call.get("id"), str) else {})


def check_tools(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tools, of which only functions are known, in the form that models were trained on."""
    checked = []
    for i, tool in enumerate(tools):
        param, function = f"tools[{i}]", tool.get("function")
        if tool.get("type", "function") != "function":
            refuse(f"{param}.type", "unsupported", "must be function; this worker runs no tools of its own")
        if not isinstance(function, dict):
            refuse(f"{param}.function", "type", "must be an object")
        checked.append({"type": "function", "function": checked_function(function, f"{param}.function")})
    return checked


def checked_function(function: dict[str, Any], param: str, schema: str = "parameters") -> dict[str, Any]:
    """What is known of the function in `param`, whose `schema` is called so there."""
    name, description, parameters = (function.get(key) for key in ("name", "description", schema))
    if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
        refuse(f"{param}.name", "format", "must be 1 to 64 letters, digits, '_', '-' and '.'")
    if not isinstance(description or "", str):
        refuse(f"{param}.description", "type", "must be a string")
    if not isinstance(parameters or {}, dict):
        refuse(f"{param}.{schema}", "type", "must be a JSON schema")
    known = {"name": name, "description": description, "parameters": parameters}
    return {key: value for key, value in known.items() if value is not None}


def chosen_tool(choice: str | dict[str, Any], tools: list[dict[str, Any]]) -> str:
    """`auto`, `none`, `required` or the name of the one tool to call."""
    names = [tool["function"]["name"] for tool in tools]
    if isinstance(choice, str):
        if choice == "required" and not names:
            refuse("tool_choice", "value", "asks for a call, but there are no tools")
        return choice
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if choice.get("type") != "function":
        refuse("tool_choice", "value", "must be auto, none, required, or an object whose type is function")
    if name not in names:
        refuse("tool_choice", "value", "must name one of the tools")
    return str(name)
