"""The steps of each Python package, run by `sdks.py` in an environment that has the packages.

usage: python sdk_rounds.py GROUP URL FOLDER

Writes FOLDER/steps.json: by step, "" or the error.  This file imports nothing of Osmium.
"""

import asyncio
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

URL = FOLDER = ""

QUESTION = "What is six times seven?"
DESCRIBE = 'Describe Paris. As JSON: {"city": "Paris", "population": 2100000}'

MODEL, KEY = "local", "none"


class City(BaseModel):
    """A city."""

    city: str
    population: int


PARIS = City(city="Paris", population=2100000)


# -- tools -----------------------------------------------------------------------------------------


def read_file(path: str) -> str:
    """Read a text file.

    Args:
        path: Path of the file.
    """
    return Path(path).read_text()


def write_file(path: str, content: str) -> str:
    """Write a text file.

    Args:
        path: Path of the file.
        content: The whole text.
    """
    Path(path).write_text(content)
    return "written"


TOOLS: dict[str, Callable[..., str]] = {"read_file": read_file, "write_file": write_file}


def parameters(*names: str) -> dict[str, Any]:
    properties = {name: {"type": "string"} for name in names}
    return {"type": "object", "properties": properties, "required": list(names)}


SCHEMAS = {"read_file": parameters("path"), "write_file": parameters("path", "content")}

CHAT_TOOLS: list[Any] = [
    {"type": "function",
     "function": {"name": name, "description": "On a text file.", "parameters": schema}}
    for name, schema in SCHEMAS.items()
]  # fmt: skip


def task() -> str:
    source, target = Path(FOLDER) / "source.txt", Path(FOLDER) / "target.txt"
    return (
        f"Read the file {source}, then write the word in it to the file {target}, then tell me it."
    )


def check_text(text: str | None) -> None:
    assert text is not None and "forty-two" in text, text
    assert "<think>" not in text and "</think>" not in text, text


def check_word(text: str | None) -> None:
    word = (Path(FOLDER) / "source.txt").read_text().strip()
    assert text is not None and word in text, text
    assert (Path(FOLDER) / "target.txt").read_text().strip() == word


def check_city(value: Any) -> None:
    assert value.model_dump() == PARIS.model_dump(), value


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


# -- openai ----------------------------------------------------------------------------------------


def openai_client() -> Any:
    import openai

    return openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)


def openai_text() -> None:
    stream = openai_client().chat.completions.create(
        model=MODEL, messages=user(QUESTION), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    check_text("".join(c.choices[0].delta.content or "" for c in chunks if c.choices))
    assert chunks[-1].usage.completion_tokens > 0


def openai_tools() -> None:
    client, messages = openai_client(), user(task())
    for _ in range(4):
        with client.chat.completions.stream(
            model=MODEL, messages=messages, tools=CHAT_TOOLS
        ) as stream:
            message = stream.get_final_completion().choices[0].message
        messages.append(message)
        if not message.tool_calls:
            return check_word(message.content)
        for call in message.tool_calls:
            content = TOOLS[call.function.name](**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": content})
    raise AssertionError("the rounds do not end")


def openai_structured() -> None:
    done = openai_client().chat.completions.parse(
        model=MODEL, messages=user(DESCRIBE), response_format=City
    )
    check_city(done.choices[0].message.parsed)


def openai_responses_text() -> None:
    with openai_client().responses.stream(model=MODEL, input=QUESTION) as stream:
        for _ in stream:
            pass
        check_text(stream.get_final_response().output_text)


def openai_responses_tools() -> None:
    client, items = openai_client(), user(task())
    tools = [{"type": "function", "name": name, "parameters": schema, "strict": False}
             for name, schema in SCHEMAS.items()]  # fmt: skip
    for _ in range(4):
        response = client.responses.create(model=MODEL, input=items, tools=tools, store=False)
        calls = [item for item in response.output if item.type == "function_call"]
        if not calls:
            return check_word(response.output_text)
        items += response.output
        for call in calls:
            output = TOOLS[call.name](**json.loads(call.arguments))
            items.append({"type": "function_call_output", "call_id": call.call_id,
                          "output": output})  # fmt: skip
    raise AssertionError("the rounds do not end")


def openai_responses_structured() -> None:
    done = openai_client().responses.parse(model=MODEL, input=DESCRIBE, text_format=City)
    check_city(done.output_parsed)


# -- anthropic -------------------------------------------------------------------------------------


def anthropic_client() -> Any:
    import anthropic

    return anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0)


def anthropic_text() -> None:
    with anthropic_client().messages.stream(
        model=MODEL, max_tokens=500, messages=user(QUESTION)
    ) as stream:
        check_text("".join(stream.text_stream))


def anthropic_tools() -> None:
    client, messages = anthropic_client(), user(task())
    tools = [{"name": name, "description": "On a text file.", "input_schema": schema}
             for name, schema in SCHEMAS.items()]  # fmt: skip
    for _ in range(4):
        with client.messages.stream(
            model=MODEL, max_tokens=500, messages=messages, tools=tools
        ) as stream:
            message = stream.get_final_message()
        messages.append({"role": "assistant", "content": message.content})
        calls = [block for block in message.content if block.type == "tool_use"]
        if not calls:
            return check_word("".join(b.text for b in message.content if b.type == "text"))
        assert message.stop_reason == "tool_use", message.stop_reason
        results = [{"type": "tool_result", "tool_use_id": call.id,
                    "content": TOOLS[call.name](**call.input)} for call in calls]  # fmt: skip
        messages.append({"role": "user", "content": results})
    raise AssertionError("the rounds do not end")


def anthropic_runner() -> None:
    """The package's own loop, which asks for a conversation that the server keeps."""
    import anthropic

    final = (
        anthropic_client()
        .beta.messages.tool_runner(
            model=MODEL, max_tokens=500, messages=user(task()),
            tools=[anthropic.beta_tool(function) for function in TOOLS.values()],
        )
        .until_done()
    )  # fmt: skip
    check_word("".join(block.text for block in final.content if block.type == "text"))


def anthropic_structured() -> None:
    done = anthropic_client().messages.parse(
        model=MODEL, max_tokens=500, messages=user(DESCRIBE), output_format=City
    )
    check_city(done.parsed_output)


# -- litellm ---------------------------------------------------------------------------------------


def litellm_options() -> dict[str, Any]:
    return {"model": f"openai/{MODEL}", "api_base": f"{URL}/v1", "api_key": KEY, "num_retries": 0}


def litellm_text() -> None:
    import litellm

    stream = litellm.completion(messages=user(QUESTION), stream=True, **litellm_options())
    check_text("".join(chunk.choices[0].delta.content or "" for chunk in stream))


def litellm_tools() -> None:
    import litellm

    messages = user(task())
    for _ in range(4):
        chunks = list(
            litellm.completion(
                messages=messages, tools=CHAT_TOOLS, stream=True, **litellm_options()
            )
        )
        message = litellm.stream_chunk_builder(chunks, messages=messages).choices[0].message
        messages.append(message)
        if not message.tool_calls:
            return check_word(message.content)
        for call in message.tool_calls:
            content = TOOLS[call.function.name](**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": content})
    raise AssertionError("the rounds do not end")


def litellm_structured() -> None:
    import litellm

    done = litellm.completion(messages=user(DESCRIBE), response_format=City, **litellm_options())
    check_city(City.model_validate_json(done.choices[0].message.content))


# -- langchain-openai ------------------------------------------------------------------------------


def langchain_model() -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model=MODEL, base_url=f"{URL}/v1", api_key=KEY, max_retries=0)


def langchain_text() -> None:
    check_text("".join(str(chunk.text) for chunk in langchain_model().stream(QUESTION)))


def langchain_tools() -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool

    tools = {name: tool(function) for name, function in TOOLS.items()}
    model, messages = langchain_model().bind_tools([*tools.values()]), [HumanMessage(task())]
    for _ in range(4):
        chunks = list(model.stream(messages))
        message = sum(chunks[1:], chunks[0])
        messages.append(message)
        if not message.tool_calls:
            return check_word(str(message.text))
        for call in message.tool_calls:
            result = tools[call["name"]].invoke(call["args"])
            messages.append(ToolMessage(result, tool_call_id=call["id"]))
    raise AssertionError("the rounds do not end")


def langchain_structured() -> None:
    for method in ("json_schema", "function_calling", "json_mode"):
        model = langchain_model().with_structured_output(City, method=method)
        check_city(model.invoke(DESCRIBE))


# -- instructor ------------------------------------------------------------------------------------


def instructor_structured() -> None:
    import instructor

    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.JSON):
        client = instructor.from_openai(openai_client(), mode=mode)
        check_city(
            client.chat.completions.create(
                model=MODEL, messages=user(DESCRIBE), response_model=City, max_retries=0
            )
        )


def instructor_streamed() -> None:
    import instructor

    client = instructor.from_openai(openai_client(), mode=instructor.Mode.TOOLS)
    parts = client.chat.completions.create_partial(
        model=MODEL, messages=user(DESCRIBE), response_model=City, max_retries=0
    )
    *_, last = parts
    assert (last.city, last.population) == ("Paris", 2100000), last


# -- pydantic-ai -----------------------------------------------------------------------------------


def pydantic_model() -> Any:
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    return OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=f"{URL}/v1", api_key=KEY))


def pydantic_text() -> None:
    from pydantic_ai import Agent

    async def run() -> str:
        async with Agent(pydantic_model()).run_stream(QUESTION) as result:
            return "".join([text async for text in result.stream_text(delta=True)])

    check_text(asyncio.run(run()))


def pydantic_tools() -> None:
    from pydantic_ai import Agent

    agent = Agent(pydantic_model(), tools=[*TOOLS.values()])
    check_word(agent.run_sync(task()).output)


def pydantic_structured() -> None:
    from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput

    for kind in (ToolOutput, NativeOutput, PromptedOutput):
        check_city(Agent(pydantic_model(), output_type=kind(City)).run_sync(DESCRIBE).output)


# -- smolagents ------------------------------------------------------------------------------------


def smolagents_model() -> Any:
    from smolagents import OpenAIModel

    return OpenAIModel(model_id=MODEL, api_base=f"{URL}/v1", api_key=KEY)


def smolagents_text() -> None:
    from smolagents import ChatMessage, MessageRole

    message = ChatMessage(MessageRole.USER, [{"type": "text", "text": QUESTION}])
    stream = smolagents_model().generate_stream([message])
    check_text("".join(delta.content or "" for delta in stream))


def smolagents_tools() -> None:
    from smolagents import ToolCallingAgent, tool

    for streams in (False, True):
        (Path(FOLDER) / "target.txt").unlink(missing_ok=True)
        agent = ToolCallingAgent(
            tools=[tool(function) for function in TOOLS.values()], model=smolagents_model(),
            max_steps=5, verbosity_level=0, stream_outputs=streams,
        )  # fmt: skip
        check_word(str(agent.run(task())))


# -- openai-agents ---------------------------------------------------------------------------------


def agents_runs(prompt: str, api: str, streams: bool = False, **options: Any) -> Any:
    import agents
    import openai

    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)
    kinds = {"chat": agents.OpenAIChatCompletionsModel, "responses": agents.OpenAIResponsesModel}
    model = kinds[api](model=MODEL, openai_client=client)
    agent = agents.Agent(name="assistant", model=model, **options)

    async def run() -> Any:
        if not streams:
            return (await agents.Runner.run(agent, prompt)).final_output
        result = agents.Runner.run_streamed(agent, prompt)
        async for _ in result.stream_events():
            pass
        return result.final_output

    return asyncio.run(run())


def agents_text(api: str = "chat") -> None:
    check_text(agents_runs(QUESTION, api, streams=True))


def agents_tools(api: str = "chat") -> None:
    import agents

    tools = [agents.function_tool(function) for function in TOOLS.values()]
    check_word(agents_runs(task(), api, streams=True, tools=tools))


def agents_structured(api: str = "chat") -> None:
    check_city(agents_runs(DESCRIBE, api, output_type=City))


# -- llm -------------------------------------------------------------------------------------------


def llm_model() -> Any:
    from llm.default_plugins.openai_models import Chat

    model = Chat(MODEL, api_base=f"{URL}/v1", supports_tools=True, supports_schema=True)
    model.key = KEY
    return model


def llm_text() -> None:
    check_text("".join(llm_model().prompt(QUESTION, stream=True)))


def llm_tools() -> None:
    check_word(llm_model().chain(task(), tools=[*TOOLS.values()]).text())


def llm_structured() -> None:
    check_city(City.model_validate_json(llm_model().prompt(DESCRIBE, schema=City).text()))


# -- all -------------------------------------------------------------------------------------------

GROUPS: dict[str, dict[str, Any]] = {
    "openai": {"text": openai_text, "tools": openai_tools, "structured": openai_structured},
    "openai responses": {
        "text": openai_responses_text, "tools": openai_responses_tools,
        "structured": openai_responses_structured,
    },
    "anthropic": {
        "text": anthropic_text, "tools": anthropic_tools, "structured": anthropic_structured,
    },
    "anthropic tool runner": {"tools": anthropic_runner},
    "litellm": {"text": litellm_text, "tools": litellm_tools, "structured": litellm_structured},
    "langchain-openai": {
        "text": langchain_text, "tools": langchain_tools, "structured": langchain_structured,
    },
    "instructor": {"text": instructor_streamed, "structured": instructor_structured},
    "pydantic-ai": {
        "text": pydantic_text, "tools": pydantic_tools, "structured": pydantic_structured,
    },
    "smolagents": {"text": smolagents_text, "tools": smolagents_tools},
    "openai-agents": {
        "text": agents_text, "tools": agents_tools, "structured": agents_structured,
    },
    "openai-agents responses": {
        "text": lambda: agents_text("responses"),
        "tools": lambda: agents_tools("responses"),
        "structured": lambda: agents_structured("responses"),
    },
    "llm": {"text": llm_text, "tools": llm_tools, "structured": llm_structured},
}  # fmt: skip


def main() -> None:
    global URL, FOLDER
    group, URL, FOLDER = sys.argv[1:]
    found = {}
    for step, run in GROUPS[group].items():
        (Path(FOLDER) / "target.txt").unlink(missing_ok=True)
        try:
            run()
            found[step] = ""
        except Exception:
            found[step] = traceback.format_exc()
    (Path(FOLDER) / "steps.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
