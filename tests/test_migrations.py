"""A home of any earlier revision becomes one of today, with what it held, after a backup."""
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext

from deerml.capture import schema

REVISIONS = [one.revision for one in schema._script().walk_revisions()]


def made_at(path, revision: str) -> sa.Engine:
    "A database as a deerml of that revision left it, with one camera"
    engine, script = schema.open_engine(f"sqlite:///{path}"), schema._script()
    with EnvironmentContext(Config(), script, fn=lambda found, _: script._upgrade_revs(revision, found)) as environment, engine.begin() as connection:
        environment.configure(connection=connection, target_metadata=schema.metadata)
        environment.run_migrations()
        connection.execute(schema.camera.insert().values(id="gate", name="gate", zone="UTC", first_seen="2026-10-31T00:00:00.000Z"))
    return engine


@pytest.mark.parametrize("revision", REVISIONS)
def test_every_revision_leads_to_the_tables_of_today(tmp_path, revision):
    engine, saved = made_at(tmp_path / "old.db", revision), []
    assert schema.revision_of(engine) == revision
    is_old = revision != REVISIONS[0]
    assert schema.migrate(engine, before=lambda: saved.append(True)) == is_old and saved == [True] * is_old
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
        assert connection.scalar(sa.select(schema.camera.c.id)) == "gate"
    engine.dispose()


def test_the_ledger_of_tests_cannot_be_rewritten(tmp_path):
    engine = made_at(tmp_path / "new.db", "head")
    with engine.begin() as connection:
        made = connection.execute(schema.judgement.insert().values(made_at="t", challenger="a", verdict="first", result="{}"))
        version = connection.execute(schema.test_version.insert().values(name="test-v1", nights="[]", frames=0, digest="d", made_at="t"))
        connection.execute(schema.test_use.insert().values(version_id=version.inserted_primary_key[0], challenger="a", judgement_id=made.inserted_primary_key[0], made_at="t"))
    for table in (schema.test_use, schema.test_version):
        for statement in (table.delete(), table.update().values(made_at="later")):
            with pytest.raises(sa.exc.IntegrityError, match="append-only"), engine.begin() as connection:
                connection.execute(statement)
    engine.dispose()
