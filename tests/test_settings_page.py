from docs import settings


def test_page_describes_the_current_settings():
    """If this fails after a change of a setting, run `python -m docs.settings`."""
    assert settings.PAGE.read_text() == settings.render()
