"""Conversations as prompts: Code Llama's own formats, and templates that repositories bring.

What a user writes stays text: the names of control tokens in it never become the tokens.
"""

from codellama_rt.chat.chat_format import ChatFormat, find_format, read_chat_template
from codellama_rt.chat.jinja_format import JinjaFormat
from codellama_rt.chat.messages import Message, checked_messages
from codellama_rt.chat.sandbox import ChatTemplateError

__all__ = [
    "ChatFormat",
    "ChatTemplateError",
    "JinjaFormat",
    "Message",
    "checked_messages",
    "find_format",
    "read_chat_template",
]
