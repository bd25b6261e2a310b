"""Conversations as prompts: Code Llama's own formats, and the templates of checkpoints.

What a user writes stays text: names of control tokens inside it never become the tokens.
"""

from codellama_rt.text.chat.chat_format import ChatFormat, find_format, read_chat_template
from codellama_rt.text.chat.jinja_format import JinjaFormat
from codellama_rt.text.chat.messages import Message, checked_messages
from codellama_rt.text.chat.sandbox import ChatTemplateError

__all__ = [
    "ChatFormat",
    "ChatTemplateError",
    "JinjaFormat",
    "Message",
    "checked_messages",
    "find_format",
    "read_chat_template",
]
