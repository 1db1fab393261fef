from tests.page.steps import *
from tests.parts.browser import Look
def test_it(visits):
    v = arrive(visits(Look(390)))
    draw(v.page, "!slow 3")
    for _ in range(8):
        print(v.page.evaluate("""() => { const p = document.querySelector("progress"); const r = p?.getBoundingClientRect(); return [scrollY, innerHeight, document.documentElement.scrollHeight, r?.top, document.querySelector(".stage").getBoundingClientRect().top] }"""))
        v.page.wait_for_timeout(150)
    v.page.screenshot(path="/tmp/zz.png")
