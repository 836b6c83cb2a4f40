'use client'

import { useMutation, useQuery, useQueryClient } from '@tanstack/react-query'
import type { UseMutationResult } from '@tanstack/react-query'
import { createContext, createElement, useCallback, useContext, useEffect, useMemo, useState, useSyncExternalStore } from 'react'
import type { ReactElement, ReactNode } from 'react'
import { _liveOf, createAutotag } from '../index.js'
import type { AnyClient, Autotag, AutotagError, Cancelled, Enqueued, Job, LiveStatus } from '../index.js'
import { addressOf, AssetList, WRITTEN } from './assets.js'
import type { AnyRow, AssetData, Key } from './assets.js'
import { JobList, OneJob } from './jobs.js'
import type { LiveJob } from './jobs.js'
import { nameOf, useShared } from './shared.js'

export type { LiveJob } from './jobs.js'

interface Provided { supabase: AnyClient, workspaceId: Key | undefined, accessToken: (() => Promise<string | null>) | undefined }
const Context = createContext<Provided | null>(null)

export interface AutotagProviderProps {
  supabase: AnyClient
  /** The workspace of hooks that do not name one. */
  workspaceId?: Key | undefined
  /** Needed only if you call `supabase.realtime.setAuth(token)` yourself. */
  accessToken?: (() => Promise<string | null>) | undefined
  children?: ReactNode
}

/** Gives the hooks your client of supabase-js. It must be inside TanStack Query's provider. */
export function AutotagProvider({ supabase, workspaceId, accessToken, children }: AutotagProviderProps): ReactElement {
  const provided = useMemo(() => ({ supabase, workspaceId, accessToken }), [supabase, workspaceId, accessToken])
  return createElement(Context.Provider, { value: provided }, children)
}

function useProvided(given: Key | undefined): Provided & { workspaceId: Key } {
  const provided = useContext(Context)
  if (!provided) throw new Error('supabase-autotag: put <AutotagProvider supabase={…}> around your app')
  const workspaceId = given ?? provided.workspaceId
  if (workspaceId === undefined) throw new Error('supabase-autotag: name a workspaceId, here or at <AutotagProvider>')
  return { ...provided, workspaceId }
}

/** The core client of a workspace. */
export function useAutotag(given?: Key): Autotag {
  const { supabase, workspaceId, accessToken } = useProvided(given)
  return useMemo(() => createAutotag(supabase, { workspaceId, ...accessToken && { accessToken } }), [supabase, accessToken, workspaceId])
}

export interface Tagging {
  /** Whether messages arrive. */
  status: LiveStatus
  /** Why messages do not arrive. */
  error: AutotagError | null
  /** Unfinished uploads, and uploads that have ended since the page was opened; newest first. */
  jobs: LiveJob[]
  /** `enqueue.mutate(ids)`, `enqueue.error` */
  enqueue: UseMutationResult<Enqueued, AutotagError, readonly Key[]>
  cancel: UseMutationResult<Cancelled, AutotagError, string>
  retry: UseMutationResult<Enqueued, AutotagError, string>
}

/** The cache key for a workspace and a client of supabase-js. When its user signs out, everything below this key is removed. */
function useKey(given: Key): readonly ['autotag', number, string] {
  const client = useQueryClient()
  const { supabase, workspaceId, accessToken } = useProvided(given)
  const scope = useMemo(() => ['autotag', nameOf(supabase), String(workspaceId)] as const, [supabase, workspaceId])
  useEffect(() => {
    _liveOf(supabase, workspaceId, accessToken).kept.set(client, () => client.removeQueries({ queryKey: scope, type: 'inactive' }))
  }, [client, supabase, workspaceId, accessToken, scope])
  return scope
}

/** A workspace's uploads, and functions that start, cancel and retry one. */
export function useTagging(given?: Key): Tagging {
  const client = useQueryClient()
  const { workspaceId } = useProvided(given)
  const autotag = useAutotag(workspaceId)
  const scope = useKey(workspaceId)
  const queryKey = useMemo(() => [...scope, 'jobs'], [scope])
  const list = useShared(client, JSON.stringify(queryKey), () => new JobList(client, queryKey, autotag))
  const { data } = useQuery({ queryKey, queryFn: () => list.load(), staleTime: Infinity })
  const live = useLive(workspaceId)
  const begun = (made: Enqueued): void => {
    if (made.job_id && made.image_count) {
      const { job_id, image_count, eta } = made
      list.patch({ job_id, image_count, eta, ...made.strategy && { strategy: made.strategy } })
    }
  }
  const enqueue = useMutation<Enqueued, AutotagError, readonly Key[]>({ mutationFn: (ids) => autotag.enqueue(ids), onSuccess: begun })
  const cancel = useMutation<Cancelled, AutotagError, string>({
    mutationFn: (jobId) => autotag.cancel(jobId), onSuccess: () => { void list.refresh() },
  })
  const retry = useMutation<Enqueued, AutotagError, string>({ mutationFn: (jobId) => autotag.retry(jobId), onSuccess: begun })
  return { ...live, jobs: data ?? [], enqueue, cancel, retry }
}

/** Whether messages arrive, as React state. */
function useLive(given: Key): Pick<Tagging, 'status' | 'error'> {
  const { supabase, workspaceId, accessToken } = useProvided(given)
  const live = useMemo(() => _liveOf<Key>(supabase, workspaceId, accessToken), [supabase, workspaceId, accessToken])
  const subscribe = useCallback((changed: () => void) => live.listen({ onStatus: changed }), [live])
  const status = useSyncExternalStore(subscribe, () => live.status, (): LiveStatus => 'connecting')
  const error = useSyncExternalStore(subscribe, () => live.error, () => null)
  return { status, error }
}

/** One upload, with its stages; null: none. */
export function useJob(jobId: string | null, given?: Key): { job: Job | undefined, error: AutotagError | null, isPending: boolean } {
  const client = useQueryClient()
  const { workspaceId } = useProvided(given)
  const autotag = useAutotag(workspaceId)
  const scope = useKey(workspaceId)
  const queryKey = useMemo(() => [...scope, 'job', jobId], [scope, jobId])
  const one = useShared(client, JSON.stringify(queryKey), () => new OneJob(client, queryKey, autotag, jobId))
  const { data, error, isPending } = useQuery<Job, AutotagError>({
    queryKey, queryFn: () => one.load(), enabled: jobId !== null, staleTime: Infinity,
  })
  return { job: data, error, isPending }
}

export interface AssetsOptions<Row> {
  workspaceId?: Key
  /** Your query: table, columns and filters, without order and limit. */
  query: () => PromiseLike<{ data: Row[] | null }>
  /** The column with the image's id. Default: id. */
  key?: keyof Row & string
  /** The column that orders the rows. Default: created_at. */
  orderBy?: keyof Row & string
  /** Default: false, which means newest first. */
  ascending?: boolean
  /** Rows of a page. Default: 50. */
  pageSize?: number
  /** The column with the tags, if it is not `tags`. */
  tagsColumn?: keyof Row & string
  /** The first page, as a server has rendered it. */
  initialRows?: Row[]
  /** Fetch again when the window gets the focus: people's edits in other windows are not broadcast. Default: false. */
  refetchOnFocus?: boolean
}

export interface Assets<Row> {
  rows: Row[]
  isPending: boolean
  error: Error | null
  hasMore: boolean
  isLoadingMore: boolean
  loadMore(): void
  /** Shows rows that you have written: inserted rows, and rows whose tags a person has edited. */
  put(rows: readonly Row[]): void
  /** Fetches all loaded rows again. */
  refresh(): void
}

/** Pages of rows, newest first, which are updated while they are tagged. Only changed rows are fetched. */
export function useAssets<Row extends object>(options: AssetsOptions<Row>): Assets<Row> {
  const { query, key = 'id', orderBy = 'created_at', ascending = false, pageSize = 50 } = options
  const client = useQueryClient()
  const { supabase, workspaceId, accessToken } = useProvided(options.workspaceId)
  const address = addressOf(query)
  const scope = useKey(workspaceId)
  const queryKey = useMemo(
    () => [...scope, 'assets', address, key, orderBy, ascending, pageSize], [scope, address, key, orderBy, ascending, pageSize])
  const written = options.tagsColumn ? [...WRITTEN.filter((name) => name !== 'tags'), options.tagsColumn] : WRITTEN
  const source = { query, key, orderBy, ascending, pageSize, written }
  const list = useShared(client, JSON.stringify(queryKey), () =>
    new AssetList<AnyRow>(client, queryKey, _liveOf<Key>(supabase, workspaceId, accessToken), source))
  useEffect(() => { list.source = source })
  const { initialRows } = options
  const { data, error, isPending } = useQuery<AssetData<AnyRow>>({
    queryKey,
    queryFn: () => list.load(),
    staleTime: Infinity,
    refetchOnWindowFocus: options.refetchOnFocus ? 'always' : false,
    ...initialRows && { initialData: { rows: initialRows as AnyRow[], hasMore: initialRows.length >= pageSize } },
  })
  const [isLoadingMore, setLoading] = useState(false)
  const loadMore = useCallback(() => {
    setLoading(true)
    list.loadMore().catch((problem: unknown) => console.warn('supabase-autotag:', problem)).finally(() => setLoading(false))
  }, [list])
  const put = useCallback((rows: readonly Row[]) => list.put(rows as readonly AnyRow[]), [list])
  const refresh = useCallback(() => { void client.refetchQueries({ queryKey, exact: true }, { cancelRefetch: false }) }, [client, queryKey])
  return {
    rows: (data?.rows ?? []) as Row[], isPending, error, hasMore: data?.hasMore ?? false, isLoadingMore, loadMore, put, refresh,
  }
}
