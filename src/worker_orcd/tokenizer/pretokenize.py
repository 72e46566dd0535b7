"""How text is cut into words before byte pairs are merged, by the names of `tokenizer.ggml.pre`.

A rule is a list of regular expressions applied one after another: each cuts the pieces left by the one before into
its matches and what lies between. They are the published expressions of the models' own tokenizers, in the
Oniguruma syntax of the `tokenizers` library, where `\\p{…}` are Unicode categories.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from worker_orcd.errors import ModelLoadFailed

_CONTRACTION: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATION: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*"

_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _words(digits: str, letters: str = r"\p{L}+", punctuation: str = _PUNCTUATION) -> str:
    """The cl100k family: contractions, words with one leading sign, digits, punctuation, white space."""
    return rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?{letters}|{digits}|{punctuation}|{_SPACES}"


def _cased_words(digits: str, suffix: str, *, without: str = "", newline_slash: str = r"\r\n/") -> str:
    """The o200k family: words also end where lower case turns into upper; `suffix` ends a word."""
    upper = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{without}]"
    lower = rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{without}]"
    lead = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{lead}{upper}*{lower}+{suffix}|{lead}{upper}+{lower}*{suffix}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[{newline_slash}]*|{_SPACES}"


_LLAMA3: Final = (_words(r"\p{N}{1,3}"),)
_QWEN2: Final = (_words(r"\p{N}"),)
_O200K: Final = (_cased_words(r"\p{N}{1,3}", rf"{_CONTRACTION}?"),)
_DIGITS_GPT2: Final = (r"\p{N}", _GPT2)
_DEEPSEEK3: Final = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)
_NOT_SENTENCE_MARKS: Final = r" ?[^(\s|.,!?…。，、।۔،)]+"
_CASED_LETTERS: Final = (  # of alphabets with case, as DeepSeek's first tokenizer lists them
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_KIMI: Final = r"\p{Han}+|" + _cased_words(
    r"\p{N}{1,3}", rf"{_CONTRACTION}?", without=r"&&[^\p{Han}]", newline_slash=r"\r\n"
)


@dataclass(frozen=True)
class PreTokenizer:
    """`patterns` in order; `whole_words` takes a word that is in the vocabulary without merging;
    `add_bos` is the default where the file does not say; `composes` letters and their marks first (Unicode's NFC)."""

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False
    composes: bool = False


def _table() -> dict[str, PreTokenizer]:
    rules = {
        "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2": PreTokenizer(
            _LLAMA3, whole_words=True, add_bos=True
        ),
        "dbrx smaug-bpe glm4 chatglm-bpe": PreTokenizer(_LLAMA3),
        "qwen2": PreTokenizer(_QWEN2, composes=True),
        "deepseek-r1-qwen stablelm2 hunyuan megrez kormo f2llmv2 grok-2 solar-open": PreTokenizer(_QWEN2),
        "qwen35": PreTokenizer(
            (_words(r"\p{N}", r"[\p{L}\p{M}]+", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),), composes=True
        ),
        "gpt-2 phi-2 mpt olmo jais trillion granite-docling gigachat exaone4 a.x-4.0 mellum modern-bert jina-es"
        " jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code roberta-bpe": PreTokenizer((_GPT2,)),
        "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2": PreTokenizer(_DIGITS_GPT2),
        "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
        "gpt-4o llama4 kanana2 minimax-m2": PreTokenizer(_O200K),
        "tekken": PreTokenizer((_cased_words(r"\p{N}", ""),), whole_words=True, add_bos=True),
        "deepseek-v3 hunyuan-dense joyai-llm": PreTokenizer(_DEEPSEEK3),
        "deepseek-llm": PreTokenizer(
            (
                r"[\r\n]",
                rf"\s?[{_CASED_LETTERS}]+",
                r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
                r"(?<!\s)\s++$",  # \s+$ of a line, begun once in a run and not at each place of it
                "[一-龥ࠀ-一가-퟿]+",
                r"\p{N}+",
            )
        ),
        "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
        "poro-chat bloom gpt3-finnish": PreTokenizer((_NOT_SENTENCE_MARKS,)),
        "viking": PreTokenizer((_NOT_SENTENCE_MARKS, r"\p{N}")),
        "chameleon": PreTokenizer(
            (
                "<sentinel:[0-9]+>",
                "IMGIMG[A-I]{1,4}Z",
                r"[\t\n]|    |  ",
                r"\p{N}",
                r"[\p{P}!-/:-@\[-`{-~]",
                _GPT2,
            ),
            add_bos=True,
        ),
        "bailingmoe bailingmoe2 llada-moe": PreTokenizer(
            (
                r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
                r"|\s+(?!\S)|\s+",
            )
        ),
        "seed-coder": PreTokenizer((_words(r"\p{N}", punctuation=r" ?[^\s\p{L}\p{N}\r\n]+"),)),
        "kimi-k2": PreTokenizer((_KIMI,)),
    }
    return {name: rule for names, rule in rules.items() for name in names.split()}


PRE_TOKENIZERS: Final[Mapping[str, PreTokenizer]] = MappingProxyType(_table())


def pre_tokenizer(name: str) -> PreTokenizer:
    """The rule of a `tokenizer.ggml.pre` name. Raises ModelLoadFailed for a name not in the table."""
    rule = PRE_TOKENIZERS.get(name)
    if rule is None:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise ModelLoadFailed(f"tokenizer.ggml.pre {name[:64]!r} is not supported; known are {known}")
    return rule
