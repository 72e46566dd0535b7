"""What models say: content, reasoning and tool calls told apart, as the text comes."""

from worker_orcd.server.output.call_reader import decoded
from worker_orcd.server.output.json_schema import adapted, inlined
from worker_orcd.server.output.pieces import Content, OutputParser, Piece, Reasoning, ToolCall
from worker_orcd.server.output.styles import parser_for, tool_grammar

__all__ = [
    "Content",
    "OutputParser",
    "Piece",
    "Reasoning",
    "ToolCall",
    "adapted",
    "decoded",
    "inlined",
    "parser_for",
    "tool_grammar",
]
