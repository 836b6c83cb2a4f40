"""Finds reasons why the rows of a table may not be memberships, and the claim that names a user's workspaces.

Names only rank candidates. A table is certain because of its structure: its key, its references, columns that cannot
hold a state, and policies of the table of images that require one of its rows and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from autotag.install.details import Policy
from autotag.install.facts import Facts, Table
from autotag.install.keys import KINDS
from autotag.install.quoting import quote, table_name

LIKE_MEMBERS = re.compile(
    r"member|user|account|people|person|staff|employee|collaborat|participa|seat|crew|profile|role|access|permission"
)
UNLIKE_MEMBERS = re.compile(
    r"(?:^|_)(?:logs?|audits?|events?|histor\w*|visit\w*|views?|seen|reads?|activit\w*|sessions?|favou?rit\w*|stars?|follow\w*"
    r"|likes?|bookmark\w*|subscri\w*|notif\w*|requests?|invit\w*|pending|appli\w*|wait\w*|bans?|banned|block\w*|mute\w*"
    r"|reports?|tokens?|devices?|settings?|preferences?|usages?|archiv\w*|former|ex|deleted|old)(?=_|$)"
)
#: Words of a name that means only `members of a workspace`, in addition to the words for the workspace itself.
MEMBERS_ONLY = re.compile(r"members?|memberships?|users?|people|persons?|staff|employees?|collaborators?|crew")
WORKSPACE = re.compile(
    r"(workspace|organi[sz]ation|org|tenant|team|account|project|library|librarie|group|company|companie)s?"
)
#: Times that every row has. They are not a state if they are not null and default to now.
TIMES = re.compile(r"(created|inserted|updated|modified|joined|added)(_at|_on|_date)?")
NOW = re.compile(
    r"(now|clock_timestamp|statement_timestamp|transaction_timestamp|CURRENT_(TIMESTAMP|DATE)|LOCALTIMESTAMP)"
    r"( \d)?( AT TIME ZONE '[Uu][Tt][Cc]')?|timezone '[Uu][Tt][Cc]' , now"
)
ROLE = re.compile(rf"(?:(?:{WORKSPACE.pattern}|{MEMBERS_ONLY.pattern})_)?role(_name)?")
STATE = re.compile(
    r"(?:^|_)(?:status|state|active|enabled|disabled|pending|accepted|approved|confirmed|verified|revoked|removed|deleted|left"
    r"|invit\w*|request\w*|propos\w*|previous|former|expire\w*|expiry|valid_\w+|bann?ed|blocked|suspended|archived|locked)(?=_|$)"
)
#: Flags and times that are not about membership.
NO_STATE = re.compile(
    r"(?:^|_)(?:admin|owner|default|primary|notif\w*|favou?rite|pinned|seen|read|login|visit\w*|born|birth\w*)(?=_|$)"
)
#: Roles of people who are members.
ROLES = frozenset(
    ("owner", "admin", "administrator", "manager", "editor", "member", "user", "viewer", "reader", "writer",
     "contributor", "author", "moderator", "maintainer", "developer", "collaborator", "staff")
)  # fmt: skip
#: Parts of an expression as Postgres prints it: strings, names, casts, operators.
TOKEN = re.compile(
    r"""'(?:[^']|'')*' | (?:"(?:[^"]|"")*"|\w+)(?:\.(?:"(?:[^"]|"")*"|\w+))*
    | ::(?:character\ varying|[\w."]+)(?:\(\d+\))?(?:\[\])? | [<>=!?|&\#@~+\-*/%^]+ | \S""",
    re.VERBOSE,
)
#: Expressions for the caller, or for a claim of their token, in the output of `plain`.
CALLER = r"auth\.(?:uid|jwt(?: ->>? '[^']*')*)"
#: Keywords after which rows of other tables may come.
NO_PLAIN_TABLE = KINDS | {"p": "partitioned"}


def snake(name: str) -> str:
    """``organizationId`` -> ``organization_id``."""
    return re.sub(r"(?<=[a-z0-9])([A-Z])", r"_\1", name).lower()


def sounds_like_members(name: str) -> bool:
    """Whether the name of a table or function suggests members. This is used only for ranking."""
    short = snake(name.rpartition(".")[2])
    return bool(LIKE_MEMBERS.search(short)) and not UNLIKE_MEMBERS.search(short)


def is_user(facts: Facts, target: tuple[str, str]) -> bool:
    """Whether a column refers to a user's id: of auth.users, or of a table with the same keys."""
    if target == ("auth.users", "id"):
        return True
    table = facts.tables.get(target[0])
    return table is not None and table.references.get(target[1]) == ("auth.users", "id")


def doubts_about(
    facts: Facts, images: Table, workspace: str, other: Table, columns: tuple[str, str], caller: Sequence[str]
) -> list[str]:
    """Why a row of a table may not be a membership; empty: every row is one.

    Args:
        facts: of the project.
        images: the table of images.
        workspace: its column with the workspace.
        other: the table that may list members.
        columns: its columns with the workspace and the user.
        caller: the path of the claim that says who the caller is; empty: ``auth.uid()``.
    """
    doubts = [f"is {NO_PLAIN_TABLE[other.kind]}"] if other.kind in NO_PLAIN_TABLE else []
    if other.partition_of or other.has_children:
        doubts.append("shares its rows with other tables (inherits)")
    if not other.is_unique(set(columns)):
        doubts.append(f"has a key other than {columns[0]} and {columns[1]}")
    doubts += _states(other, columns)
    doubts += filter(None, [users_can_join(other, columns)])
    doubts += _policies(images, workspace, other, columns, caller)
    return doubts + _references(facts, images, workspace, other, columns, own_logins=not caller)


def _policies(
    images: Table, workspace: str, other: Table, columns: tuple[str, str], caller: Sequence[str]
) -> list[str]:
    """Doubts about a table from the row level security of the images. If that is off, the table's name decides."""
    if not images.users_read or (
        images.row_security and not any(p.reads and p.permissive for p in images.row_policies)
    ):
        return [f"says nothing about who may see {images.name}, of which users see no row"]
    if not images.row_security:
        named = _only_members(other, images.references.get(workspace), workspace)
        return [] if named else ["does not sound like a list of members"]
    asking = {
        policy: policy.permissive and asks_for_row(policy.using, images, workspace, other, columns, caller)
        for policy in images.row_policies
    }
    if not all(asks for policy, asks in asking.items() if policy.reads):
        return [f"is not what the policies of {images.name} look at, or not all of it"]
    if not _shows_own_rows(other, columns, caller):
        return ["has policies or grants that may hide a user's own row from the policies of the images"]
    if not _agree_on_updates(asking):
        return [
            f"lists users who may see {images.name} and, by its policies for update, not change it (--members-where can"
            " leave them out)"
        ]
    return []


def _agree_on_updates(holds: Mapping[Policy, bool]) -> bool:
    """Whether the policies for update, if there are any, allow updates to the users for whom `holds` is true."""
    updates = {policy: held for policy, held in holds.items() if policy.updates}
    return not updates or (any(updates.values()) and all(policy.permissive for policy in updates))


def called_functions(conditions: Iterable[Policy | str], names: Iterable[str]) -> list[str]:
    """The functions among these that are called by the conditions (policies or texts)."""
    text = " ".join(one if isinstance(one, str) else f"{one.using} {one.check}" for one in conditions)
    return [name for name in names if re.search(rf'(?<![\w".]){re.escape(table_name(name))}\(', text)]


def describe_functions(images: Table, names: Sequence[str]) -> dict[str, str]:
    """The functions among these that the policies of the images call, with what they decide; those for update first."""
    updating = called_functions([policy for policy in images.row_policies if policy.updates], names)
    reading = called_functions([policy for policy in images.row_policies if policy.reads], names)
    may_see = {name: "decides who may see images" for name in reading if name not in updating}
    return {**dict.fromkeys(updating, "decides who may change images"), **may_see}


def _references(
    facts: Facts, images: Table, workspace: str, other: Table, columns: tuple[str, str], *, own_logins: bool
) -> list[str]:
    doubts = []
    here, there = images.references.get(workspace), other.references.get(columns[0])
    if there is None:
        doubts.append(f"has no foreign key on {columns[0]}, so it may be about something else")
    elif here and here != there:
        doubts.append(f"refers to {there[0]}, where {images.name} refers to {here[0]}")
    kind, person = other.base_type(columns[1]), other.references.get(columns[1])
    if not own_logins:
        return doubts
    if kind != "uuid":
        doubts.append(f"has {kind} ids of users, where Supabase's own are uuids (--caller-claim)")
    if person is None:
        doubts.append(f"has no foreign key on {columns[1]}, so it may be about something else")
    elif not is_user(facts, person):
        doubts.append(f"refers to {person[0]} for its users, which does not refer to auth.users")
    return doubts


def _states(other: Table, columns: tuple[str, str]) -> list[str]:
    """Columns that can mean that a row is not a current member."""
    roles, doubts = [], []
    for name in other.columns:
        if name in columns or (snake(name) in ("id", "uuid") and other.is_unique({name})):
            continue
        kind, required = other.base_type(name) or "", name in other.required
        if TIMES.fullmatch(snake(name)) and kind.startswith(("timestamp", "date")):
            if not (required and NOW.fullmatch(plain(other.defaults.get(name, "")))):
                doubts.append(f"has the column {name}, which may be null or says when something else happened")
        elif ROLE.fullmatch(snake(name)):
            roles += _role(other, name, required=required)
        else:
            doubts.append(f"has the column {name}, so not every row may be a member")
    return roles + doubts


def _role(other: Table, name: str, *, required: bool) -> list[str]:
    labels = other.labels.get(name) or _checked(other, name)
    if name in other.references:
        return [f"has the column {name}, whose values are rows of {other.references[name][0]}"]
    if not labels:
        return [f"has the column {name} ({other.columns[name]}), which can have any value (invited, for example)"]
    word = next((label for label in labels if label.lower() not in ROLES), None)
    if word is not None:
        return [f"has the value {word} in {name}, so not every row may be a member"]
    return [] if required else [f"has the column {name}, which may be null"]


def _checked(other: Table, name: str) -> list[str]:
    """The values that a constraint of the table or of the column's domain lists; empty: no constraint lists values."""
    checks = [(quote(name), check) for check in other.checks]
    checks += [("VALUE", check) for check in other.domain_checks.get(name, [])]
    for column, check in checks:
        match = re.fullmatch(
            rf"CHECK {re.escape(column)} = (?:ANY ARRAY \[ (.+) \]|('[^']*'))", plain(check), re.DOTALL
        )
        if match and re.fullmatch(r"'[^']*'(?: , '[^']*')*", match[1] or match[2]):
            return re.findall(r"'([^']*)'", match[1] or match[2])
    return []


def _only_members(other: Table, target: tuple[str, str] | None, workspace: str) -> bool:
    """Whether the name of a table consists only of words for members and for its workspace."""
    words = snake(other.name.rpartition(".")[2]).split("_")
    own = snake(workspace).removesuffix("_id").split("_")
    if target:
        own += snake(target[0].rpartition(".")[2]).split("_")
    known = {form for word in own for form in (word, word.removesuffix("s"), f"{word}s")}
    return all(word in known or WORKSPACE.fullmatch(word) or MEMBERS_ONLY.fullmatch(word) for word in words) and any(
        MEMBERS_ONLY.fullmatch(word) for word in words
    )


def plain(expression: str | None) -> str:
    """An expression as Postgres prints it, without parentheses, casts, and the ``select`` around ``auth.uid()``."""
    parts = [part for part in TOKEN.findall(expression or "") if part not in "()" and not part.startswith("::")]
    return re.sub(r"SELECT (auth\.uid|auth\.jwt(?: ->>? '[^']*')*) AS (?:\"[^\"]*\"|\w+)", r"\1", " ".join(parts))


def caller_code(path: Sequence[str]) -> str:
    """The expression for the caller in the output of `plain`: the claim at `path`, or `auth.uid()` without one."""
    return f"auth.jwt {''.join(f'-> {part!r} ' for part in path[:-1])}->> '{path[-1]}'" if path else "auth.uid"


def asks_for_row(
    using: str | None, images: Table, workspace: str, other: Table, columns: tuple[str, str], claim: Sequence[str]
) -> bool:
    """Whether a policy of the table of images requires only a row with this workspace and the caller."""
    head, _, rest = plain(using).partition(" FROM ")
    schema, _, short = other.name.partition(".")
    match = re.fullmatch(rf"{re.escape(quote(schema))}\.{re.escape(quote(short))}(?: (\S+))? WHERE (.+)", rest)
    if not match:
        return False
    row, caller = match[1] or quote(short), caller_code(claim)
    its_workspace, its_user = (f"{row}.{quote(column)}" for column in columns)
    asked = {frozenset(condition.split(" = ")) for condition in match[2].split(" AND ")}
    image = f"{quote(images.name.partition('.')[2])}.{quote(workspace)}"
    same, mine = frozenset((its_workspace, image)), frozenset((its_user, caller))
    if re.fullmatch(r"EXISTS SELECT(?: [\w.\"]+(?: AS \S+)?(?: , [\w.\"]+)*)?", head):
        return asked == {same, mine}
    if head in (f"{quote(workspace)} {test} SELECT {its_workspace}" for test in ("IN", "= ANY", "= ANY ARRAY")):
        return asked == {mine}
    return head == f"{caller} IN SELECT {its_user}" and asked == {same}


def _shows_own_rows(other: Table, columns: tuple[str, str], claim: Sequence[str]) -> bool:
    """Whether users see all their own rows of a table. The policies of the images cannot find rows that the table's own
    policies hide."""
    if not other.users_read.issuperset(columns):
        return False
    read, user = [policy for policy in other.row_policies if policy.reads], quote(columns[1])
    own = {f"{user} = {caller_code(claim)}", f"{caller_code(claim)} = {user}", "true"}
    ways = {plain(way) for policy in read for way in parts_of(policy.using or "", "OR")}
    return not other.row_security or (all(policy.permissive for policy in read) and bool(ways & own))


def users_can_join(other: Table, columns: tuple[str, str]) -> str:
    """How users can write rows of a table by who they are, without a right in the workspace; empty: they cannot.

    It continues a sentence that begins with the table.
    """
    if other.kind in "rp" and not other.row_security and set(columns) & other.users_write:
        return "has no row level security, and users may write it, so they can add themselves"
    for policy in other.row_policies:
        allows = policy.writes and policy.permissive
        if allows and not _asks_for_right(policy.check or policy.using or "true", other, columns):
            return "has a policy by which users can add themselves"
    return ""


def _asks_for_right(expression: str, other: Table, columns: tuple[str, str]) -> bool:
    """Whether a condition requires a right of the caller in the row's workspace, not just a certain caller.

    A function of the project that gets the workspace counts as such, because its code cannot be judged.
    """
    for word, enough in (("OR", all), ("AND", any)):
        parts = parts_of(expression, word)
        if len(parts) > 1:
            return enough(_asks_for_right(part, other, columns) for part in parts)
    table = re.escape(quote(other.name.partition(".")[2]))
    workspace, user = (rf'(?<![\w."])(?:{table}\.)?{re.escape(quote(column))}(?![\w"])' for column in columns)
    text = re.sub(rf"{user} = {CALLER}|{CALLER} = {user}|{CALLER} IS NOT NULL", "", plain(expression))
    if text == "false":
        return True
    rights = re.search(CALLER, text) or re.search(r'(?<![\w".])(?!auth\.)[\w"]+\.[\w"]+\(', expression)
    return bool(rights and re.search(workspace, text)) and not re.search(r"\bOR\b|user_meta", text)


def writes_unchecked(table: Table, column: str) -> bool:
    """Whether users may write any value into a column, because no policy for writing restricts it."""
    if column not in table.users_write:
        return False
    allowed = [policy for policy in table.row_policies if policy.writes and policy.permissive]
    return not table.row_security or any(
        not re.search(rf"(?<!\w){re.escape(quote(column))}(?!\w)", policy.check or policy.using or "")
        for policy in allowed
    )


def states(table: Table, columns: tuple[str, str]) -> list[str]:
    """Columns that may mean that a row is not a current member, in a table that a person has named: a flag, a time at
    which something ended, a status, or a role such as ``invited``."""
    found = []
    for name, declared in table.columns.items():
        kind, word = table.base_type(name) or "", snake(name)
        if name in columns:
            continue
        flag = kind == "boolean" and not NO_STATE.search(word)
        time = kind.startswith(("timestamp", "date")) and not TIMES.fullmatch(word) and not NO_STATE.search(word)
        if flag or time or (STATE.search(word) and kind not in ("jsonb", "json")):
            found.append(f"has the column {name} ({declared})")
        elif ROLE.fullmatch(word):
            labels = table.labels.get(name) or _checked(table, name)
            found += [f"has the value {label} in {name}" for label in labels if label.lower() not in ROLES][:1]
    return found


def parts_of(expression: str, word: str) -> list[str]:
    """Splits an expression, as Postgres prints it, at its outermost ``word`` (AND or OR)."""
    depth, begin, parts = 0, 1, []
    for match in re.finditer(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|[()]|\b(?:AND|OR)\b", expression):
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        if depth == 0 and match.end() < len(expression):
            return [expression]  # Postgres prints parentheses around an AND or OR, so this is something else (CASE)
        if match[0] == word and depth == 1:
            parts.append(expression[begin : match.start()].strip())
            begin = match.end()
    return [*parts, expression[begin:-1].strip()] if parts else [expression]


def claim_in(images: Table, workspace: str) -> tuple[tuple[str, ...], str]:
    """The claim that every policy for reading images compares with the workspace, and with nothing else; or empty.

    Also its form in the policies (`members.Members.claim_form`).
    """
    none: tuple[tuple[str, ...], str] = (), ""
    claims = {p: claim_of(plain(p.using), quote(workspace)) if p.permissive else none for p in images.row_policies}
    found = {claim for policy, claim in claims.items() if policy.reads}
    if not images.row_security or not images.users_read or len(found) != 1:
        return none
    claim = found.pop()
    return claim if _agree_on_updates({policy: own == claim for policy, own in claims.items()}) else none


def read_as(images: Table, claim: Sequence[str]) -> str:
    """The form of a claim in policies that compare it in another way (``coalesce``): ``text``, or empty if unknown."""
    text = " ".join(plain(one) for policy in images.row_policies for one in (policy.using, policy.check))
    as_text = caller_code(claim)
    return "text" if as_text in text and as_text.replace("->>", "->") not in text else ""


def claim_of(text: str, workspace: str) -> tuple[tuple[str, ...], str]:
    name, column = r"'(?:[^']+)'", re.escape(workspace)
    path, last = rf"auth\.jwt((?: -> {name})*", rf" ->> {name})"
    lists = rf"(?:SELECT )?jsonb_array_elements_text {path})(?: AS \w+)?"
    for pattern, form in (
        (rf"{column} = {path}{last}", "text"), (rf"{path}{last} = {column}", "text"),
        (rf"{column} (?:IN|= ANY|= ANY ARRAY) {lists}", "list"), (rf"{path}) \? {column}", "keys"),
    ):  # fmt: skip
        match = re.fullmatch(pattern, text)
        if match and match[1] and "user_meta" not in match[1]:  # users write it themselves
            return tuple(re.findall(r"'([^']+)'", match[1])), form
    return (), ""
