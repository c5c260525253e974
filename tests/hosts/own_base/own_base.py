"""A host that maps our message on its own Base, so that its tables can refer to it."""

from sqlalchemy import BigInteger, ForeignKey, MetaData, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from engagement import (
    EngagementMessageMixin,
    EngagementPauseMixin,
    EngagementReceiptMixin,
    EngagementSuppressionMixin,
    EngagementWorkerMixin,
)


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
        }
    )


class Customer(Base):
    __tablename__ = "customers"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(Text, unique=True)


class Message(EngagementMessageMixin, Base):
    replies: Mapped[list["Reply"]] = relationship(back_populates="message")


class Suppression(EngagementSuppressionMixin, Base):
    pass


class KeptReceipt(EngagementReceiptMixin, Base):
    pass


class WhoWorks(EngagementWorkerMixin, Base):
    pass


class Pause(EngagementPauseMixin, Base):
    pass


class Reply(Base):
    __tablename__ = "replies"

    id: Mapped[int] = mapped_column(primary_key=True)
    message_id: Mapped[int] = mapped_column(BigInteger, ForeignKey("engagement_message_queue.id"))
    words: Mapped[str] = mapped_column(Text)
    message: Mapped[Message] = relationship(back_populates="replies")
