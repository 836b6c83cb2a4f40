'use client'

import { QueryClient, QueryClientProvider } from '@tanstack/react-query'
import { useRouter } from 'next/navigation'
import { useState } from 'react'
import { describeStage } from 'supabase-autotag'
import { AutotagProvider, useAssets, useTagging } from 'supabase-autotag/react'
import { COLUMNS, PAGE_SIZE } from './images'
import type { Image } from './images'
import { browserClient } from './supabase'

interface GalleryProps { workspaceId: string, initialRows: Image[] }

/** Follows the images that the server has rendered. */
export function Gallery(props: GalleryProps) {
  const [queries] = useState(() => new QueryClient())
  const [supabase] = useState(browserClient)
  return (
    <QueryClientProvider client={queries}>
      <AutotagProvider supabase={supabase} workspaceId={props.workspaceId}>
        <Images {...props} />
      </AutotagProvider>
    </QueryClientProvider>
  )
}

function Images({ workspaceId, initialRows }: GalleryProps) {
  const router = useRouter()
  const [problem, setProblem] = useState('')
  const { status, enqueue } = useTagging()
  const { rows, put, hasMore, loadMore } = useAssets<Image>({
    query: () => browserClient().from('assets').select(COLUMNS).eq('workspace_id', workspaceId),
    pageSize: PAGE_SIZE, initialRows,
  })

  async function add(files: FileList | null) {
    const supabase = browserClient()
    setProblem('')
    const images: Image[] = []
    for (const file of files ?? []) {
      const path = `${workspaceId}/${crypto.randomUUID()}`
      const { error } = await supabase.storage.from('assets').upload(path, file, { contentType: file.type })
      if (error) return setProblem(error.message)
      // the database has inserted the row with the file
      const row = await supabase.from('assets').select(COLUMNS).eq('storage_bucket', 'assets').eq('storage_path', path).single()
      if (row.error) return setProblem(row.error.message)
      images.push(row.data)
    }
    put(images)
    enqueue.mutate(images.map((image) => image.id)) // one upload
  }

  return (
    <main>
      <button onClick={() => void browserClient().auth.signOut().then(() => router.refresh())}>Sign out</button>
      <p role="status">{status === 'live' ? 'Live' : 'Connecting…'}</p>
      <p role="alert">{problem || (enqueue.error && `${enqueue.error.message} ${enqueue.error.hint}`)}</p>
      <input type="file" aria-label="Add images" multiple accept="image/*" onChange={(event) => add(event.target.files)} />
      <ul aria-label="Images">
        {rows.map((image) => (
          <li key={image.id} data-stage={image.tagging_stage ?? 'none'}>{describeStage(image).text} {image.tagging_error} {image.tags?.join(', ')}</li>
        ))}
      </ul>
      {hasMore && <button onClick={loadMore}>More</button>}
    </main>
  )
}
