"""An agentic task: look up how many pieces of a part are in stock, with a tool, then say it."""

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, system_message, use_tools
from inspect_ai.tool import Tool, tool

STOCK = {"bolts": "421", "nuts": "77", "washers": "1309", "springs": "58"}


@tool
def pieces_in_stock() -> Tool:
    """The tool that the agent has."""

    async def execute(part: str) -> str:
        """Look up how many pieces of a part are in stock.

        Args:
            part: the part's name, such as bolts.
        """
        return STOCK.get(part.strip().lower(), "no such part")

    return execute


@task
def stock() -> Task:
    """One question a part; nobody knows the answer without the tool."""
    samples = [Sample(id=part, input=f"How many {part} are in stock?", target=count) for part, count in STOCK.items()]
    solver = [system_message("Use the tool, then answer with the number."), use_tools(pieces_in_stock()), generate()]
    return Task(dataset=samples, solver=solver, scorer=includes())
