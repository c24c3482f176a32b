"""What speculate.py asks: answers that repeat much of a text, and answers that repeat none.

The constants of `edgert/speculate.py` were chosen on other prompts of the same kinds.
"""

EDIT = {
    "names": """Repeat this text, and write Paul wherever it says Peter:

Peter has a workshop in Kiel. On Mondays Peter repairs bicycles, on Tuesdays Peter repairs \
clocks, and on the other days Peter builds small wooden boats. The boats that Peter builds are \
sold at the market in the old town. When the market is closed, Peter paints the boats blue and \
white, and puts them on the shelf above the door.""",
    "typos": """Correct the spelling mistakes in this text. Change nothing else.

The station measures the temperatur, the humidity and the pressure of the air every ten minutes. \
The values are writen to a small card, and once a day they are sent to the office by radio. If \
the battery is low, the station stops sending and only writes to the card. A red light on the \
front shows that the card is allmost full.""",
    "code": """Rename the variable `x` to `price` in this code. Print all of the code.

```python
def total(items):
    result = 0.0
    for x in items:
        if x < 0:
            raise ValueError("a price is below zero")
        result = result + x
    return result


def cheapest(items):
    best = None
    for x in items:
        if best is None or x < best:
            best = x
    return best
```""",
    "json": """Add the key "stock" with the value 5 to every entry, and print all of the JSON:

```json
{
  "apples": {"price": 1.20, "unit": "kg", "country": "Italy"},
  "pears": {"price": 1.80, "unit": "kg", "country": "Spain"},
  "plums": {"price": 2.40, "unit": "kg", "country": "Germany"},
  "lemons": {"price": 0.40, "unit": "piece", "country": "Spain"}
}
```""",
    "numbers": """Put a number from 1 to 8 in front of each line:

open the valve of the main tank
wait until the pressure is stable
read the pressure and write it down
close the valve of the main tank
open the valve of the small tank
wait until the small tank is full
close the valve of the small tank
switch off the pump""",
    "capitals": """Repeat this text, and write every colour in capital letters:

The flag of the club has three stripes. The upper stripe is red, the stripe in the middle is \
white and the lower stripe is green. In the middle of the flag there is a yellow star. The \
letters below the star are black. On holidays the flag is put on the blue tower next to the old \
gate, where everybody in the village can see it.""",
    "summary": """Summarise the text in three sentences, in its own words:

The bridge over the Leine was closed in March because cracks had been found in two of its \
pillars. Engineers from the city measured the cracks every week and found that they did not \
grow. In June the pillars were strengthened with steel rings, and the bridge was opened again \
for bicycles and people on foot. Cars have to wait until next spring, when the road on the \
bridge will be made new.""",
    "extract": """Which sentences of the text speak about the door? Copy them.

The garage has room for two cars. The door of the garage opens by itself when a car comes near. \
In winter the floor is heated. The door of the garage closes after thirty seconds, unless \
somebody stands below it. There is a shelf for tools on the left side. A lamp above the door \
shows whether the garage is locked.""",
}

OPEN = {
    "story": "Tell me a story about a baker who wakes up and has forgotten how to bake.",
    "why": "Why do leaves change their colour in autumn?",
    "advice": "How can I learn to sleep better? I lie awake for hours.",
    "compare": "What is the difference between a virus and a bacterium?",
    "letter": "Write a letter to the mayor that asks for a new playground in our street.",
    "person": "Who was Ada Lovelace, and what did she do?",
    "how": "How does a refrigerator work?",
    "plan": "I want to grow vegetables on my balcony. Where do I begin?",
}
