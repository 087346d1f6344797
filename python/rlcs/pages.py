"""Which pages of a cache hold which prompt and which answer of a rollout.

Dims: N prompts, G answers each, B answers that run, M pages of the longest sequence.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from glm4v import Glm4v
from glm4v.cache import PagedCache

PAGE = 16  # tokens; what two answers of a prompt cannot share is less than a page


class Pages:
    """Deals out the cache: pages that a prompt's answers share, and pages of their own.

    ``rows`` answers always find their own pages, and prompts share out the rest: nobody waits for ever.
    """

    def __init__(
        self,
        model: Glm4v,
        lengths: np.ndarray,  # [N] tokens of the prompts
        limits: np.ndarray,  # [N] most tokens of an answer
        group: int,
        rows: int,
        cache_tokens: int | None,
    ) -> None:
        self.group = group
        self.shared = lengths // PAGE  # [N] full pages of each prompt
        self.prompt_pages = _pages(lengths)
        self.total = _pages(lengths + limits)
        own = int((self.total - self.shared).max(initial=0))
        self.rows = min(rows, group * len(lengths))
        largest = np.sort(self.prompt_pages)[::-1]

        def for_prompts(rows: int) -> int:
            # Four times the prompts that the rows would need if groups ended as one; then the last answers of many
            # groups may run while others begin.
            return int(largest[: 4 * -(-rows // group)].sum())

        if cache_tokens is not None:
            pages = cache_tokens // PAGE
            while self.rows > 1 and self.rows * own + for_prompts(self.rows) > pages:
                self.rows -= 1
            least = own + int(largest[:1].sum())
            if pages < least:
                expectation = f"at least {least * PAGE}, for one answer"
                raise ValueError(f"rollouts: cache_tokens must be {expectation}, got {cache_tokens}")
            self._for_prompts = pages - self.rows * own
        else:
            self._for_prompts = for_prompts(self.rows)
        pages = self.rows * own + self._for_prompts
        self.cache = PagedCache(model.config.text_config, pages, PAGE, model.dtype, model.device)
        self._free = list(range(pages - 1, -1, -1))  # the latest used come first: they are near
        self._of_prompt: dict[int, list[int]] = {}
        self._tables = np.zeros((group * len(lengths), int(self.total.max(initial=0))), dtype=np.int32)

    def give_prompt(self, i: int) -> bool:
        """Pages for a prompt, if there are enough."""
        count = int(self.prompt_pages[i])
        if count > self._for_prompts:
            return False
        self._for_prompts -= count
        self._of_prompt[i] = self._pop(count)
        self._tables[i * self.group : (i + 1) * self.group, :count] = self._of_prompt[i]
        return True

    def give(self, answers: np.ndarray) -> None:
        """Pages for answers; what a prompt has begun is copied to where each of its answers goes on."""
        source, target = [], []
        for answer in answers.tolist():
            i = answer // self.group
            shared, total = int(self.shared[i]), int(self.total[i])
            table = self._tables[answer]
            own = self._pop(total - shared)
            if shared < self.prompt_pages[i]:
                source.append(int(table[shared]))
                target.append(own[0])
            table[shared:total] = own
        if source:
            self.cache.copy(*torch.tensor([source, target], device=self.cache.seqlens.device))

    def take_back(self, answers: list[int]) -> None:
        for answer in answers:
            i = answer // self.group
            self._free += self._tables[answer, self.shared[i] : self.total[i]].tolist()

    def take_prompt_back(self, i: int) -> None:
        pages = self._of_prompt.pop(i)
        self._for_prompts += len(pages)
        self._free += pages

    def table(self, answers: np.ndarray) -> Tensor:
        """``[B, M]``: the pages of each answer in order."""
        return torch.from_numpy(self._tables[answers]).to(self.cache.seqlens.device)

    def _pop(self, count: int) -> list[int]:
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return taken


def _pages(tokens: np.ndarray) -> np.ndarray:
    return -(-tokens // PAGE)
