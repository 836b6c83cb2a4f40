import type { QueryClient, QueryKey } from '@tanstack/react-query'
import { AutotagError, fromRest } from '../errors.js'
import type { RestError } from '../errors.js'
import { answerTo } from '../limit.js'
import type { Live } from '../live.js'

const CHUNK = 500 // rows of one request; a project's own limit is rarely lower
const MAX_IDS = 100 // of one request
const LONGEST_IDS = 4_000 // characters of the ids in a URL: proxies refuse longer URLs
// ms; after these, every LONGEST_RETRY if the error may pass by itself, otherwise at the next message
const RETRIES = [1_000, 2_000, 4_000, 8_000, 16_000]
const LONGEST_RETRY = 30_000
const WRITTEN = ['tagging_stage', 'tagging_progress', 'tagging_eta', 'tagging_error', 'tagging_result', 'tags']
const LIVE = /^(queued|preparing|submitted|processing|completing)$/

export type Key = string | number
export type AnyRow = Record<string, unknown>
export interface AssetData<Row> { rows: Row[], hasMore: boolean }

/** A query of supabase-js that has its table, columns and filters. */
// eslint-disable-next-line @typescript-eslint/no-explicit-any
type Builder = any

export interface Source {
  query: () => Builder
  key: string
  orderBy: string
  ascending: boolean
  pageSize: number
  written: readonly string[]
}

/** The URL of a query, which identifies its rows. */
export function addressOf(query: () => Builder): string {
  const builder = query() as { url?: URL, schema?: string, body?: unknown }
  if (!builder.url) throw new Error('useAssets: `query` must return a query of supabase-js: supabase.from(…).select(…)')
  const args = builder.body === undefined ? '' : ` ${JSON.stringify(builder.body)}` // of a function
  return `${builder.schema ?? ''} ${builder.url.pathname}${builder.url.search}${args}`
}

/** A select list with one-letter names for the columns, and the names for which they stand. */
export interface Lean { select: string, names: Record<string, string> }

/**
 * The part of a select list with the key and the columns that autotag writes. One-letter names halve the size of the answer. null: these
 * columns cannot be identified.
 */
export function leanSelect(select: string | null, key: string, written: readonly string[]): Lean | null {
  const items = !select || select === '*' ? [key, ...written] : itemsOf(select)
  if (select?.includes('"') || items.length > 1 && items.includes('*')) return null
  const lean: Lean = { select: '', names: {} }
  for (const item of items) {
    const [, alias, source = ''] = /^(?:([^:()]+):(?!:))?(.*)$/.exec(item)!
    const [column = ''] = source.split(/->|::|[(!.]/, 1)
    const path = source.split('::', 1)[0]!.split(/->>?/)
    const name = alias ?? (source.includes('(') ? column : path.at(-1)!)
    if (name !== key && !written.includes(column)) continue
    if (path.length > 1 && /^-?\d+$/.test(name)) return null // an element of a list has no name of its own
    const letter = String.fromCharCode(97 + Object.keys(lean.names).length)
    lean.names[letter] = name
    lean.select += `${lean.select && ','}${letter}:${source}`
  }
  const names = Object.values(lean.names)
  return names.includes(key) && names.length <= 26 ? lean : null
}

/** The items of a select list. */
function itemsOf(select: string): string[] {
  const items = ['']
  let depth = 0
  for (const part of select.split(/([(),])/)) {
    if (part === ',' && !depth) { items.push(''); continue }
    depth += part === '(' ? 1 : part === ')' ? -1 : 0
    items.push(items.pop()! + part)
  }
  return items.map((item) => item.trim())
}

/** Compares two values as Postgres orders them: numbers, numbers as text, times and uuids. */
function compare(a: unknown, b: unknown): number {
  if (a === b) return 0
  if (typeof a === 'number' && typeof b === 'number') return a - b
  const [x, y] = [String(a), String(b)]
  if (/^-?\d+$/.test(x) && /^-?\d+$/.test(y)) return BigInt(x) < BigInt(y) ? -1 : 1
  return x < y ? -1 : 1
}

const quote = (value: unknown): string => `"${String(value).replace(/["\\]/g, '\\$&')}"`
const listed = (id: string): string => /^[\w-]+$/.test(id) ? id : quote(id) // supabase-js's in() does not escape

function renamed<Row extends AnyRow>(row: Row, names: Record<string, string>): Row {
  return Object.fromEntries(Object.entries(row).map(([letter, value]) => [names[letter], value])) as Row
}

/**
 * The rows of one query in a QueryClient, and the only code that fetches them: pages, and rows that messages report as changed. It makes
 * one request at a time; rows that are reported meanwhile are in the next one.
 */
export class AssetList<Row extends AnyRow> {
  source: Source
  readonly #client: QueryClient
  readonly #queryKey: QueryKey
  readonly #live: Live<Key>
  #ids = new Set<string>() // whose rows have changed
  #head = false // rows have changed, but it is unknown which
  #everything = false
  #put = new Map<string, Row>() // rows written by this page since the last load began
  #elsewhere = new Set<string>() // changed rows that are below the loaded ones
  #jobs = new Set<string>()
  #busy: Promise<unknown> = Promise.resolve()
  #pumping = false
  #running = 0
  #loadBegan = 0
  #fetchEnded = 0
  #generation = 0 // increases with each change of user
  #failures = 0
  #passes = false // whether the last error may pass by itself
  #largest = 0 // rows of the longest answer so far
  #limit = CHUNK // the project's own limit, if it is lower
  #timer: ReturnType<typeof setTimeout> | undefined
  #lean = true
  #more: Promise<void> | null = null
  #stopListening: (() => void) | null = null

  constructor(client: QueryClient, queryKey: QueryKey, live: Live<Key>, source: Source) {
    this.#client = client
    this.#queryKey = queryKey
    this.#live = live
    this.source = source
  }

  start(): void {
    this.#stopListening = this.#live.listen({
      onChange: (ids, jobId) => this.changed(ids, jobId),
      onSync: () => {
        this.#reload()
        if (this.#loadBegan >= this.#live.liveSince) return
        this.#everything = true
        void this.#pump()
      },
      onEnqueued: (ids, since) => this.#enqueued(ids, since),
      onUserChange: () => this.#forget(),
    })
  }

  stop(): void {
    this.#stopListening?.()
    clearTimeout(this.#timer)
    this.#loadBegan = 0 // it misses messages from now on
  }

  /** The first load has failed. */
  #reload(): void {
    if (!this.#data) void this.#client.refetchQueries({ queryKey: this.#queryKey, exact: true }, { cancelRefetch: false })
  }

  get #data(): AssetData<Row> | undefined { return this.#client.getQueryData<AssetData<Row>>(this.#queryKey) }

  #write(rows: Row[], hasMore: boolean): void {
    this.#client.setQueryData<AssetData<Row>>(this.#queryKey, { rows, hasMore })
  }

  /** The key as text: messages may list numbers although the query selects `id::text`. */
  #keyOf(row: Row): string { return String(row[this.source.key]) }

  /** Whether a row can change its place. */
  get #moves(): boolean { return ![this.source.key, 'created_at'].includes(this.source.orderBy) }

  #before(a: Row, b: Row): boolean {
    const { orderBy, key, ascending } = this.source
    const [x, y] = [a[orderBy], b[orderBy]]
    if ((x === null) !== (y === null)) return y === null // nulls last
    const order = compare(x, y) || compare(a[key], b[key])
    return ascending ? order < 0 : order > 0
  }

  // -- loading

  /** Loads everything again that is loaded, or the first page if nothing is. TanStack Query calls it. */
  load(): Promise<AssetData<Row>> {
    const loaded = this.#alone(async () => {
      const count = Math.max(this.#data?.rows.length ?? 0, this.source.pageSize)
      this.#everything = this.#head = false
      this.#ids.clear()
      for (;;) { // repeat until the answer is for the user who is signed in
        const generation = this.#generation
        const data = await this.#top(count, false)
        if (generation === this.#generation) return data
      }
    })
    this.#busy = this.#busy.then(() => new Promise((resolve) => { setTimeout(resolve) })) // wait until TanStack Query has stored it
    void this.#busy.then(() => this.#pump())
    return loaded
  }

  /** The next page. */
  loadMore(): Promise<void> {
    this.#more ??= this.#alone(async () => {
      const data = this.#data
      if (!data?.hasMore) return
      const generation = this.#generation
      const { rows, full } = await this.#rows(this.source.pageSize, data.rows.at(-1))
      const now = this.#data
      if (!now || generation !== this.#generation) return
      const known = new Set(now.rows.map((row) => this.#keyOf(row)))
      this.#elsewhere.clear()
      this.#write([...now.rows, ...rows.filter((row) => !known.has(this.#keyOf(row)))], full)
    }).finally(() => { this.#more = null; void this.#pump() })
    return this.#more
  }

  /** Shows rows that this page has written: new rows in their place, known rows with their new values. */
  put(rows: readonly Row[]): void {
    for (const row of rows) this.#put.set(this.#keyOf(row), row)
    const data = this.#data
    if (data) this.#write(this.#merge(data, rows, new Set()), data.hasMore)
  }

  changed(ids: readonly Key[] | null, jobId: string | null): void {
    if (ids) for (const id of ids) this.#ids.add(String(id))
    else if (jobId && !this.#jobs.has(jobId)) this.#everything = true // rows that look done may be tagged again
    else this.#head = true
    if (!ids && jobId) this.#jobs.add(jobId)
    if (this.#client.getQueryState(this.#queryKey)?.status === 'error') this.#reload()
    void this.#pump()
  }

  #enqueued(ids: readonly Key[], since: number): void {
    const data = this.#data
    if (!data || this.#running || this.#fetchEnded >= since) return this.changed(ids, null)
    const queued = new Set(ids.map(String))
    this.#write(data.rows.map((row) => queued.has(this.#keyOf(row))
      ? { ...row, tagging_stage: 'queued', tagging_progress: 0, tagging_eta: null, tagging_error: null } : row), data.hasMore)
  }

  #forget(): void {
    this.#generation++
    this.#ids.clear()
    this.#put.clear()
    this.#jobs.clear()
    this.#head = false
    this.#loadBegan = this.#failures = 0
    if (this.#data) {
      this.#write([], false)
      this.#everything = true // load everything that the next user may see
    }
    clearTimeout(this.#timer)
    this.#timer = setTimeout(() => { this.#reload(); void this.#pump() }) // supabase-js must not be called from within its own auth event
  }

  // -- one request at a time

  /** Runs after everything that is already queued. */
  async #alone<T>(run: () => Promise<T>): Promise<T> {
    this.#running++
    const done = this.#busy.then(run).finally(() => { this.#running-- })
    this.#busy = done.catch(() => undefined)
    return await done
  }

  async #pump(): Promise<void> {
    if (this.#pumping) return
    this.#pumping = true
    clearTimeout(this.#timer)
    try {
      while (this.#data && (this.#ids.size || this.#head || this.#everything)) {
        await this.#alone(() => this.#fetchChanges())
        this.#failures = 0
      }
    } catch (error) {
      const delay = RETRIES[this.#failures++] ?? (this.#passes && LONGEST_RETRY)
      if (delay) this.#timer = setTimeout(() => { void this.#pump() }, delay)
      else { this.#failures = 0; console.warn('supabase-autotag:', error) }
    } finally {
      this.#pumping = false
    }
  }

  async #fetchChanges(): Promise<void> {
    const data = this.#data
    if (!data) return
    const generation = this.#generation
    const [everything, head] = [this.#everything, this.#head]
    if (everything || head) {
      const last = everything ? data.rows.length : data.rows.findLastIndex((row) => this.#unsettled(row)) + 1
      const ids = this.#ids
      if (everything) this.#ids = new Set()
      this.#everything = this.#head = false
      try {
        const fresh = await this.#top(Math.max(last, this.source.pageSize), !everything)
        if (generation === this.#generation) this.#write(fresh.rows, fresh.hasMore)
      } catch (error) {
        if (generation === this.#generation) { this.#everything ||= everything; this.#head ||= head; for (const id of ids) this.#ids.add(id) }
        throw error
      }
      return
    }
    const known = new Set(data.rows.map((row) => this.#keyOf(row)))
    const chunk: string[] = []
    let length = 0
    for (const id of this.#ids) {
      length += encodeURIComponent(listed(id)).length + 3
      if (chunk.length >= Math.min(MAX_IDS, this.#limit) || length > LONGEST_IDS) break
      this.#ids.delete(id)
      if (!this.#elsewhere.has(id)) chunk.push(id)
    }
    if (!chunk.length) return
    try {
      const rows = await this.#byId(chunk, chunk.every((id) => known.has(id)))
      const now = this.#data
      if (!now || generation !== this.#generation) return
      const merged = this.#merge(now, rows, new Set(chunk))
      this.#head ||= now.hasMore && merged.length < this.source.pageSize // deleted or filtered out: fill the page again
      this.#write(merged, now.hasMore)
    } catch (error) {
      if (generation === this.#generation) for (const id of chunk) this.#ids.add(id)
      throw error
    }
  }

  #unsettled(row: Row): boolean {
    const stage = row['tagging_stage']
    return stage === undefined || LIVE.test(String(stage))
  }

  /** Merges fetched rows into the rows. Requested rows that are missing in the answer were deleted or filtered out. */
  #merge(data: AssetData<Row>, fetched: readonly Row[], asked: ReadonlySet<string>): Row[] {
    const { orderBy } = this.source
    const fresh = new Map(fetched.map((row) => [this.#keyOf(row), row]))
    const rows: Row[] = []
    for (const row of data.rows) {
      const id = this.#keyOf(row)
      const newer = fresh.get(id)
      if (!newer) {
        if (!asked.has(id)) rows.push(row)
      } else if (orderBy in newer && newer[orderBy] !== row[orderBy]) {
        fresh.set(id, { ...row, ...newer }) // in another place
      } else {
        fresh.delete(id)
        rows.push({ ...row, ...newer })
      }
    }
    for (const row of fresh.values()) {
      const at = rows.findIndex((other) => this.#before(row, other))
      if (at >= 0) rows.splice(at, 0, row)
      else if (!data.hasMore) rows.push(row)
      else if (!this.#moves) this.#elsewhere.add(this.#keyOf(row)) // on a later page
    }
    return rows
  }

  // -- requests

  async #ask(builder: Builder): Promise<Row[]> {
    const answer = answerTo(builder as PromiseLike<{ data: Row[] | null, error: RestError | null, status: number }>)
    const { data, error, status } = await answer.catch((problem: unknown) => {
      this.#passes = problem instanceof AutotagError && problem.code === 'timeout'
      throw problem
    }).finally(() => { this.#fetchEnded = Date.now() })
    this.#passes = !status || status >= 500 || [408, 429].includes(status)
      || status === 401 && this.#live.status !== 'signed-out' // an expired token; without a user, retrying would not help
    if (error) throw fromRest(error, status)
    this.#largest = Math.max(this.#largest, data?.length ?? 0)
    return data ?? []
  }

  /** The first `count` rows, and rows that this page has written meanwhile; `below`: also the loaded rows below them. */
  async #top(count: number, below: boolean): Promise<AssetData<Row>> {
    const began = Date.now()
    this.#put.clear()
    const generation = this.#generation
    const { rows, full } = await this.#rows(count)
    if (generation === this.#generation) this.#loadBegan = began
    const known = full && below ? this.#data?.rows ?? [] : []
    const top = new Set(rows.map((row) => this.#keyOf(row)))
    const joins = known.some((row) => top.has(this.#keyOf(row))) // otherwise rows are missing in between
    const last = rows.at(-1)
    const tail = joins && last ? known.filter((row) => !top.has(this.#keyOf(row)) && this.#before(last, row)) : []
    const hasMore = full && (tail.length ? this.#data!.hasMore : true)
    const loaded = { rows: [...rows, ...tail], hasMore }
    this.#elsewhere.clear()
    return { rows: this.#merge(loaded, [...this.#put.values()].filter((row) => !top.has(this.#keyOf(row))), new Set()), hasMore }
  }

  /**
   * The `count` rows after a row; `full`: there may be more. A short answer means the end of the table, or the project's own limit
   * (db-max-rows). If no answer was longer before, one more row is requested to find out which.
   */
  async #rows(count: number, after?: Row): Promise<{ rows: Row[], full: boolean }> {
    const rows: Row[] = []
    while (rows.length < count) {
      const size = Math.min(count - rows.length, this.#limit)
      const page = await this.#page(size, rows.at(-1) ?? after)
      rows.push(...page)
      if (page.length === size) continue
      if (!page.length || page.length < this.#largest) return { rows, full: false }
      const next = await this.#page(1, rows.at(-1))
      if (!next.length) return { rows, full: false }
      rows.push(...next)
      this.#limit = page.length
    }
    return { rows, full: true }
  }

  async #page(size: number, after: Row | undefined): Promise<Row[]> {
    const { query, key, orderBy, ascending } = this.source
    const then = ascending ? 'gt' : 'lt'
    let builder = query()
    if (after) {
      const [value, id] = [after[orderBy], after[key]]
      if (value === undefined || id === undefined) throw new Error(`useAssets: select the columns ${orderBy} and ${key}, too`)
      if (orderBy === key) builder = builder[then](key, id)
      else if (value === null) builder = builder.is(orderBy, null)[then](key, id)
      else builder = builder.or(`${orderBy}.${then}.${quote(value)},and(${orderBy}.eq.${quote(value)},${key}.${then}.${quote(id)}),${orderBy}.is.null`)
    }
    if (orderBy !== key) builder = builder.order(orderBy, { ascending, nullsFirst: false })
    return await this.#ask(builder.order(key, { ascending }).limit(size))
  }

  /** Rows by their ids, even if the project's limit cuts an answer. Rows that are missing at the end do not exist any more. */
  async #byId(ids: readonly string[], known: boolean): Promise<Row[]> {
    const rows = await this.#some(ids, known)
    if (!rows.length || rows.length >= ids.length || rows.length < this.#largest) return rows
    const found = new Set(rows.map((row) => this.#keyOf(row)))
    return [...rows, ...await this.#byId(ids.filter((id) => !found.has(id)), known)]
  }

  /** Fetches only the columns that autotag writes, for known rows. */
  async #some(ids: readonly string[], known: boolean): Promise<Row[]> {
    const { query, key, written } = this.source
    const builder = query()
    const full = builder.url.searchParams.get('select') as string | null
    const lean = known && this.#lean ? leanSelect(full, key, this.#moves ? [...written, this.source.orderBy] : written) : null
    try {
      const rows = await this.#ask((lean ? builder.select(lean.select) : builder).filter(key, 'in', `(${ids.map(listed).join()})`))
      return lean ? rows.map((row) => renamed(row, lean.names)) : rows
    } catch (error) {
      if (!lean || (error as { code?: string }).code !== '42703') throw error
      this.#lean = false // the table has no column `tags`
      return await this.#some(ids, false)
    }
  }
}

export { WRITTEN }
