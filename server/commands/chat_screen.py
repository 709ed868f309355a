"""How ``offramp chat`` shows answers: tokens in the colour of the layer that they left after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

# From the first exit to full depth, as in cividis, whose lightness too tells the order;
# without its darkest end, which black terminals swallow.
_SCALE: Final = ((254, 232, 56), (188, 175, 111), (138, 143, 150), (96, 125, 185))
# Sources of tokens that were guessed before full depth agreed.
_GUESSED: Final = frozenset({"head", "ngram", "exit", "grammar"})
# A model may write what terminals take as orders; line breaks and tabs are harmless.
_CONTROLS: Final = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "\ufffd")


class Screen:
    """Standard output: with colours on a terminal, unless NO_COLOR is set, and plain otherwise."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._layers = 0
        self._first_exit = 0
        self._line_open = False

    @property
    def is_terminal(self) -> bool:
        """Whether somebody looks at it."""
        return self._console.is_terminal

    def piece(self, text: str, layers: Sequence[int], sources: Sequence[str]) -> None:
        """Part of an answer, with the layers its tokens left after and where they came from.

        Tokens of one pass may come together; they have the colour of their mean.
        """
        if not text:
            return
        style = Style(underline=any(source in _GUESSED for source in sources) or None)
        if layers and sum(layers) < self._layers * len(layers):
            style += Style(color=self._colour(sum(layers) / len(layers)))
        self._print(Text(text.translate(_CONTROLS), style))
        self._line_open = not text.endswith("\n")

    def summary(self, metrics: Mapping[str, Any]) -> None:
        """A line about the answer that ended."""
        self._print(Text(f"{self._break()}[{described(metrics)}]\n", Style(dim=True)))

    def end_line(self) -> None:
        """Go to a new line if text stands in this one."""
        self._print(Text(self._break()))

    def note(self, text: str) -> None:
        """A line of the program's own."""
        self._print(Text(f"{self._break()}{text}\n", Style(dim=True)))

    def legend(self, layers: int, exits: Sequence[int]) -> None:
        """Learn the model's depth, and show what the colours of its exit layers mean."""
        self._layers, self._first_exit = layers, min(exits, default=0)
        if not self.is_terminal or not exits:
            return
        line = Text().append("a token's layer: ", Style(dim=True))
        for layer in exits:
            line.append(f"{layer} ", Style(color=self._colour(layer)))
        line.append(f"{layers}; ").append("guessed", Style(underline=True)).append("\n")
        self._print(line)

    def _colour(self, layer: float) -> Color:
        share = (layer - self._first_exit) / max(1, self._layers - self._first_exit)
        place = share * (len(_SCALE) - 1)
        low = min(max(0, int(place)), len(_SCALE) - 2)
        part = min(max(0.0, place - low), 1.0)
        pairs = zip(_SCALE[low], _SCALE[low + 1], strict=True)
        return Color.from_rgb(*(a + part * (b - a) for a, b in pairs))

    def _break(self) -> str:
        opened, self._line_open = self._line_open, False
        return "\n" if opened else ""

    def _print(self, text: Text) -> None:
        if self.is_terminal:
            self._console.print(text, end="", soft_wrap=True)
        else:
            # As it is, with its tabs.
            self._console.file.write(text.plain)
            self._console.file.flush()


def described(metrics: Mapping[str, Any]) -> str:
    """Speed and depth of an answer in a line."""
    depth = metrics["early_exit"]
    parts = [f"mean exit layer {depth['mean_exit_layer'] or 0:.1f} of {depth['layers_total']}"]
    if metrics["tokens_per_second"] is not None:
        parts.append(f"{metrics['tokens_per_second']:.0f} tokens/s")
    tokens = sum(depth["exit_histogram"].values())
    if tokens and depth["passes"]:
        parts.append(f"{depth['passes'] / tokens:.2f} passes per token")
    if depth["drafted_tokens"]:
        parts.append(f"{depth['accepted_tokens']} of {depth['drafted_tokens']} drafts accepted")
    return ", ".join([depth["mode"], *parts])
