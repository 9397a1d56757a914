"""Declare a tool, let the model call it, give it the result, and read the final answer.

python examples/tool_call.py [CHECKPOINT]
"""

from __future__ import annotations

import json
import sys
from typing import Any

from v4sdk import Session

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def weather(city: str) -> str:
    """Stand in for a real service."""
    return "sunny" if city else "unknown"


def main(model: str | None) -> None:
    """Run one round of call and answer."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is the weather in Oslo?"}]
    with Session.load(model) as session:
        result = session.chat(messages, tools=[TOOL])
        if not result.tool_calls:
            print("no call:", result.content)
            return
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in result.tool_calls
        ]
        messages.append(
            {
                "role": "assistant",
                "content": result.content,
                "reasoning_content": result.reasoning or "",
                "tool_calls": calls,
            }
        )
        for call in result.tool_calls:
            print(f"call: {call.name}({call.arguments})")
            answer = weather(**json.loads(call.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": answer})
        print("answer:", session.chat(messages, tools=[TOOL]).content)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
